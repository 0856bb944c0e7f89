# SPDX-License-Identifier: Apache-2.0
"""The files of counts: whose they are, who goes on with them, and what is done with damage."""

import os
import random
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from imageserver.observability.metrics import numbers
from imageserver.observability.metrics.counted import Metrics
from imageserver.observability.metrics.layout import (
    PLACES,
    SIZE,
    DamagedFile,
    no_counts,
    pack_counts,
    parse_counts,
)
from imageserver.observability.metrics.numbers import Number, clear_if_alone, files, read_counts
from tests.unit.counting import ROOT, Process, damaged, processes, total

#: A parent that counts once, then forks a child that does; both say their numbers.
_FORK = """
import os, sys
from imageserver.observability.metrics.counted import metrics_in
metrics = metrics_in(sys.argv[1])
metrics.accepted()
metrics.accepted()  # not written yet
if os.fork() == 0:
    metrics_in(sys.argv[1]).accepted()
    print(metrics._store._number.value, flush=True)
    os._exit(0)
os.wait()
metrics.accepted()
metrics.flush()
print(metrics._store._number.value, flush=True)
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    with processes(tmp_path) as start_one:
        yield start_one


def test_what_processes_count_is_added_up(tmp_path: Path, start: Callable[[], Process]) -> None:
    one, two = start(), start()

    assert {one.count(), two.count()} == {0, 1}
    one.count()
    assert total(tmp_path) == 3


def test_a_process_goes_on_where_a_dead_one_has_stopped(
    tmp_path: Path, start: Callable[[], Process]
) -> None:
    first, second = start(), start()
    numbers = [first.count(), second.count()]
    first.kill()
    assert total(tmp_path) == 2

    successor = start()
    assert successor.count() == numbers[0]
    assert total(tmp_path) == 3


def test_there_are_no_more_files_than_processes_have_lived_at_once(
    tmp_path: Path, start: Callable[[], Process]
) -> None:
    for _ in range(4):
        pair = start(), start()
        for process in pair:
            process.count()
        for process in pair:
            process.kill()

    names = {"guard", *(f"{kind}{n}{end}" for n in "01" for kind, end in _NAMES)}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert total(tmp_path) == 8


_NAMES = [("", ""), ("counter_", ".db")]


def test_a_forked_child_counts_in_files_of_its_own(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _FORK, str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=30,
    )  # fmt: skip

    assert done.stdout.split() == ["1", "0"]
    assert total(tmp_path) == 4


def test_a_number_is_free_again_once_it_is_given_back(tmp_path: Path) -> None:
    one, two = Number(str(tmp_path)), Number(str(tmp_path))

    one.take()
    two.take()
    assert (one.value, two.value) == (0, 1)
    one.close()
    three = Number(str(tmp_path))
    three.take()
    assert three.value == 0
    two.close()
    three.close()


def test_no_file_is_no_counts(tmp_path: Path) -> None:
    assert total(tmp_path / "missing") == -1


# A cold start


def test_counts_begin_at_zero_where_nobody_counts(
    tmp_path: Path, start: Callable[[], Process]
) -> None:
    process = start()
    process.count()
    process.kill()

    assert clear_if_alone(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["guard"]


def test_counts_stay_where_somebody_counts(tmp_path: Path, start: Callable[[], Process]) -> None:
    gone, there = start(), start()
    gone.count()
    there.count()
    gone.kill()

    assert not clear_if_alone(str(tmp_path))
    there.count()
    assert total(tmp_path) == 3


# Damage


@pytest.fixture
def counter(tmp_path: Path) -> Path:
    """Return a file in which one connection was counted, by a process that is gone."""
    metrics = Metrics(str(tmp_path))
    metrics.accepted()
    metrics.close()
    return tmp_path / "counter_0.db"


def test_files_are_allocated_whole_and_hold_all_that_is_declared(counter: Path) -> None:
    assert files(str(counter.parent)) == [str(counter)]
    found = counter.stat()

    assert (found.st_size, found.st_blocks * 512 >= SIZE) == (SIZE, True)
    assert read_counts(str(counter)) is not None


def _put(at: int, data: bytes) -> Callable[[bytearray], None]:
    def spoil(content: bytearray) -> None:
        content[at : at + len(data)] = data

    return spoil


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda content: content.clear(), id="empty"),
        pytest.param(lambda content: content.__delitem__(slice(100, None)), id="cut-off"),
        pytest.param(lambda content: content.__delitem__(slice(3, None)), id="cut-off-early"),
        pytest.param(_put(0, b"\xff" * 100), id="header-written-over"),
        pytest.param(_put(0, bytes(8)), id="header-half-zero"),
        pytest.param(_put(16, struct.pack("=d", float("nan"))), id="not-a-number"),
        pytest.param(_put(SIZE - 8, struct.pack("=d", float("inf"))), id="not-finite"),
        pytest.param(_put(16, struct.pack("=d", -1.0)), id="negative"),
    ],
)
def test_a_damaged_file_is_left_out_and_replaced_by_the_next_process(
    counter: Path, spoil: Callable[[bytearray], None], start: Callable[[], Process]
) -> None:
    content = bytearray(counter.read_bytes())
    spoil(content)
    counter.write_bytes(content)

    assert (damaged(counter.parent), total(counter.parent)) == (1, -1)
    start().count()
    assert (damaged(counter.parent), total(counter.parent)) == (0, 1)


def test_a_file_in_which_nothing_was_written_is_no_damage(counter: Path) -> None:
    counter.write_bytes(bytes(SIZE))

    assert (damaged(counter.parent), total(counter.parent)) == (0, -1)


def test_a_file_of_another_version_is_left_out_and_replaced_by_the_next_process(
    counter: Path, start: Callable[[], Process]
) -> None:
    content = bytearray(counter.read_bytes())
    content[8:16] = b"another."
    counter.write_bytes(content)

    assert (damaged(counter.parent), total(counter.parent)) == (0, -1)
    start().count()
    assert (damaged(counter.parent), total(counter.parent)) == (0, 1)


def test_whatever_the_bytes_a_file_is_read_or_damaged_and_nothing_else_happens(
    counter: Path,
) -> None:
    data = counter.read_bytes()
    choose = random.Random(15)  # noqa: S311 - no secret
    spoilt = 0
    for _ in range(300):
        content = bytearray(data)
        for _ in range(choose.randrange(1, 5)):
            content[choose.randrange(len(content))] = choose.randrange(256)
        try:
            parse_counts(bytes(content[: choose.randrange(2 * len(content))]))
        except DamagedFile:
            spoilt += 1
    assert 100 < spoilt < 300


def test_what_is_no_file_is_damage(counter: Path) -> None:
    (counter.parent / "counter_7.db").mkdir()
    (counter.parent / "counter_8.db").symlink_to(counter)
    os.mkfifo(counter.parent / "counter_9.db")

    assert (damaged(counter.parent), total(counter.parent)) == (3, 1)


def test_a_file_spoilt_after_it_was_found_sound_begins_anew(
    counter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter.write_bytes(b"\xff" * SIZE)
    monkeypatch.setattr(numbers, "read_counts", lambda _path: None)
    metrics = Metrics(str(counter.parent))
    metrics.accepted()
    metrics.close()
    monkeypatch.undo()

    assert (damaged(counter.parent), total(counter.parent)) == (0, 1)


def test_every_series_has_a_place_of_its_own() -> None:
    assert parse_counts(pack_counts(no_counts())) == no_counts()
    assert len(pack_counts(no_counts())) == SIZE
    assert sorted(PLACES.values()) == [*range(len(PLACES))]
