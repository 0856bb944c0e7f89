# SPDX-License-Identifier: Apache-2.0
"""Marks between two processes that have opened one slot table's file."""

import os
from pathlib import Path

import pytest

from imageserver.runtime.directory import RuntimeDirectory
from imageserver.runtime.marks import Marks

A, B = (1, 2, 3), (1, 2, 4)


@pytest.fixture
def runtime(tmp_path: Path) -> RuntimeDirectory:
    made = RuntimeDirectory(str(tmp_path))
    made.keep("slots", os.open(tmp_path / "slots", os.O_RDWR | os.O_CREAT, 0o600))
    return made


def test_a_mark_is_seen_by_others_for_as_long_as_who_set_it_is_there(
    runtime: RuntimeDirectory,
) -> None:
    one, other, third = (Marks(runtime) for _ in range(3))
    seen = [other.among([A, B])]
    one.add(A)
    one.add(A)
    third.add(A)
    seen += [other.among([A, B]), other.among([])]
    for ended in (one, third):
        os.close(ended._fd)
        seen.append(other.among([A, B]))
    os.close(other._fd)
    runtime.close()

    assert seen == [set(), {A}, set(), {A}, set()]


def test_a_process_that_has_set_very_many_marks_drops_them_and_begins_anew(
    runtime: RuntimeDirectory,
) -> None:
    one, two, other = (Marks(runtime) for _ in range(3))
    things = [(number,) for number in range(1026)]
    two.add(A)
    for thing in things[:1024]:
        one.add(thing)
    seen = [other.among(things)]
    for thing in things[1024:]:
        one.add(thing)
    seen.append(other.among([A, *things]))
    for marks in (one, two, other):
        os.close(marks._fd)
    runtime.close()

    assert seen == [set(things[:1024]), {A, *things[1024:]}]


def test_where_no_table_is_kept_nothing_is_marked(tmp_path: Path) -> None:
    marks = Marks(RuntimeDirectory(str(tmp_path)))
    marks.add(A)
    assert marks.among([A]) == set()
