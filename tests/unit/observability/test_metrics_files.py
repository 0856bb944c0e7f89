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
from prometheus_client import values

from imageserver.observability.metrics.counted import Metrics
from imageserver.observability.metrics.numbers import (
    FILE_SIZE,
    DamagedFile,
    Numbers,
    clear_if_alone,
    files,
    is_sound,
    parse_counts,
)
from imageserver.observability.metrics.stored import CountFile
from tests.unit.counting import ROOT, Process, damaged, processes, total

#: A parent that counts once, then forks a child that does; both say their numbers.
_FORK = """
import os, sys
from imageserver.observability.metrics.counted import metrics_in
metrics = metrics_in(sys.argv[1])
metrics.accepted()
if os.fork() == 0:
    metrics_in(sys.argv[1]).accepted()
    print(metrics._store._numbers.number, flush=True)
    os._exit(0)
os.wait()
metrics.accepted()
print(metrics._store._numbers.number, flush=True)
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


_NAMES = [("", ""), ("counter_", ".db"), ("histogram_", ".db")]


def test_a_forked_child_counts_in_files_of_its_own(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _FORK, str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=30,
    )  # fmt: skip

    assert done.stdout.split() == ["1", "0"]
    assert total(tmp_path) == 3


def test_a_number_is_free_again_once_it_is_given_back(tmp_path: Path) -> None:
    one, two = Numbers(str(tmp_path)), Numbers(str(tmp_path))

    one.take()
    two.take()
    assert (one.number, two.number) == (0, 1)
    one.close()
    three = Numbers(str(tmp_path))
    three.take()
    assert three.number == 0
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
def counter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a file in which one connection was counted, by a process that is gone."""
    monkeypatch.setattr(values, "ValueClass", values.ValueClass)
    metrics = Metrics(str(tmp_path))
    metrics.accepted()
    metrics.close()
    return tmp_path / "counter_0.db"


def test_files_are_allocated_whole_and_hold_all_that_is_declared(counter: Path) -> None:
    sizes = [os.stat(path) for path in files(str(counter.parent))]

    assert [(found.st_size, found.st_blocks * 512 >= FILE_SIZE) for found in sizes] == [
        (FILE_SIZE, True)
    ] * 2
    assert is_sound(str(counter))


def _put(at: int, data: bytes) -> Callable[[bytearray], None]:
    def spoil(content: bytearray) -> None:
        content[at : at + len(data)] = data

    return spoil


def _at_value(data: bytes) -> Callable[[bytearray], None]:
    def spoil(content: bytearray) -> None:
        (used,) = struct.unpack_from("=i", content)
        content[used - 16 : used - 16 + len(data)] = data

    return spoil


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda content: content.clear(), id="empty"),
        pytest.param(lambda content: content.__delitem__(slice(100, None)), id="cut-off"),
        pytest.param(lambda content: content.__delitem__(slice(3, None)), id="cut-off-early"),
        pytest.param(_put(0, struct.pack("=i", 1 << 30)), id="used-beyond-the-end"),
        pytest.param(_put(0, struct.pack("=i", -1)), id="used-negative"),
        pytest.param(_put(8, struct.pack("=i", -64)), id="key-of-negative-length"),
        pytest.param(_put(8, struct.pack("=i", 0)), id="key-of-no-length"),
        pytest.param(_put(8, struct.pack("=i", 1 << 30)), id="key-beyond-the-end"),
        pytest.param(_put(12, b"\xff\xff"), id="key-no-text"),
        pytest.param(_put(12, b"{}"), id="key-no-json"),
        pytest.param(_at_value(struct.pack("=d", float("nan"))), id="not-a-number"),
        pytest.param(_at_value(struct.pack("=d", -1.0)), id="negative"),
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


def test_what_was_not_yet_in_use_when_a_process_died_is_no_damage(counter: Path) -> None:
    content = bytearray(counter.read_bytes())
    (used,) = struct.unpack_from("=i", content)
    content[used : used + 30] = b"\x10\0\0\0half of an entry that was bein"
    counter.write_bytes(content)

    assert (damaged(counter.parent), total(counter.parent)) == (0, 1)


def test_whatever_the_bytes_a_file_is_read_or_damaged_and_nothing_else_happens(
    counter: Path,
) -> None:
    data = counter.read_bytes()
    positions = parse_counts(data)
    (used,) = struct.unpack_from("=i", data)
    choose = random.Random(15)  # noqa: S311 - no secret
    spoilt = 0
    for _ in range(300):
        content = bytearray(data[: used + 64])
        for _ in range(choose.randrange(1, 5)):
            content[choose.randrange(len(content))] = choose.randrange(256)
        try:
            parse_counts(bytes(content[: choose.randrange(len(content))]))
        except DamagedFile:
            spoilt += 1
    assert (len(positions) > 1, spoilt > 100) == (True, True)


def test_labels_that_are_none_are_damage() -> None:
    key = b'["a", "b", 7, "c"]'
    padded = key + b" " * (8 - (len(key) + 4) % 8)
    entry = struct.pack("=i", len(key)) + padded + struct.pack("=dd", 1.0, 0.0)
    with pytest.raises(DamagedFile):
        parse_counts(struct.pack("=ii", 8 + len(entry), 0) + entry)


def test_a_file_spoilt_after_it_was_found_sound_begins_anew(counter: Path) -> None:
    counter.write_bytes(b"\xff" * 300)
    file = CountFile(str(counter))
    assert file.read("key") == 0.0
    file.close()
