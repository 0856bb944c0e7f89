# SPDX-License-Identifier: Apache-2.0
"""The files of counts: whose they are, who goes on with them, and what is done with damage."""

import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest
from prometheus_client import values

from imageserver.metrics.counted import Metrics
from imageserver.metrics.numbers import FILE_SIZE, Numbers, clear_if_alone, files, is_sound
from imageserver.metrics.shown import Sources, exposition
from imageserver.slots import Holder, Kind

#: A process that counts: each line it reads is one connection; it answers with its number.
_COUNT = """
import sys
from imageserver.metrics.counted import metrics_in
metrics = metrics_in(sys.argv[1])
for _ in sys.stdin:
    metrics.accepted()
    print(metrics._store._numbers.number, flush=True)
"""
#: A parent that counts once, then forks a child that does; both say their numbers.
_FORK = """
import os, sys
from imageserver.metrics.counted import metrics_in
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
ROOT = Path(__file__).parents[2]


class Process:
    """One of several processes that count in a directory."""

    def __init__(self, directory: Path) -> None:
        self._running = subprocess.Popen(
            [sys.executable, "-c", _COUNT, str(directory)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def count(self) -> int:
        """Count one connection; return the process's number."""
        _pipe(self._running.stdin).write("\n")
        _pipe(self._running.stdin).flush()
        return int(_pipe(self._running.stdout).readline())

    def kill(self) -> None:
        self._running.send_signal(signal.SIGKILL)
        self._running.wait()
        for pipe in (self._running.stdin, self._running.stdout):
            _pipe(pipe).close()


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def one_more(directory: Path = tmp_path) -> Process:
        started.append(Process(directory))
        return started[-1]

    yield one_more
    for process in started:
        process.kill()


class Nothing:
    """``ports.Living`` of a table where nothing is held."""

    def living(self, *kinds: Kind) -> list[Holder]:
        return []


def single(directory: Path, name: str) -> float:
    """Return a metric that has one value; -1: it is not shown."""
    limits = dict.fromkeys(Kind, 1)
    sources = Sources(str(directory), Nothing(), limits, 1, {})
    lines = exposition(sources).text.decode().splitlines()
    found = [line.split()[1] for line in lines if line.startswith(f"{name} ")]
    return float(found[0]) if found else -1


def total(directory: Path) -> float:
    """Return how many connections all processes have counted; -1: nobody."""
    return single(directory, "imageserver_connections_total")


def damaged(directory: Path) -> float:
    return single(directory, "imageserver_metrics_damaged_files")


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


# What others do to files in use


@pytest.fixture
def metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Metrics]:
    """Return metrics of this process, which have counted one connection, in a place to remove."""
    monkeypatch.setattr(values, "ValueClass", values.ValueClass)
    made = Metrics(str(tmp_path / "counts"))
    made.accepted()
    yield made
    made.close()


def _cut(directory: Path) -> None:
    for path in files(str(directory)):
        os.truncate(path, 0)


def _cut_in_an_entry(directory: Path) -> None:
    for path in files(str(directory)):
        os.truncate(path, 100)


def _remove_files(directory: Path) -> None:
    for path in files(str(directory)):
        os.unlink(path)


def _remove_all(directory: Path) -> None:
    shutil.rmtree(directory)


def _replace_by_a_file(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.touch()


LOSSES = [_cut, _cut_in_an_entry, _remove_files, _remove_all]


@pytest.mark.parametrize("lose", LOSSES)
def test_what_is_lost_is_written_anew(
    metrics: Metrics, tmp_path: Path, lose: Callable[[Path], None]
) -> None:
    directory = tmp_path / "counts"
    lose(directory)
    metrics.accepted()
    metrics.flush()
    metrics.accepted()

    assert (damaged(directory), total(directory)) == (0, 3)


def test_counting_goes_on_in_memory_where_there_is_no_place(
    metrics: Metrics, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "counts"
    _replace_by_a_file(directory)
    for _ in range(3):
        metrics.accepted()
        metrics.flush()
    assert total(directory) == -1
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["metrics"]
    directory.unlink()
    metrics.flush()

    assert total(directory) == 4


def test_who_counts_again_adds_to_what_another_has_counted_there(
    metrics: Metrics, tmp_path: Path, start: Callable[..., Process]
) -> None:
    directory = tmp_path / "counts"
    _remove_all(directory)
    directory.mkdir(0o700)
    other = start(directory)
    assert other.count() == 0
    metrics.flush()
    assert total(directory) == 2
    other.kill()
    metrics.accepted()

    assert total(directory) == 3


#: A process that may write no more than a page of each file: as on a disk that is full.
_FULL = """
import resource, sys
from imageserver.metrics.counted import metrics_in
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
metrics = metrics_in(sys.argv[1])
metrics.accepted()
metrics.flush()
print(len(list(open(sys.argv[1] + "/counter_0.db", "rb").read(4))), flush=True)
sys.stdin.readline()
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
metrics.flush()
"""


def test_a_process_without_room_lives_and_writes_what_it_has_counted_later(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _FULL, str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, input="\n", timeout=30, check=False,
    )  # fmt: skip

    assert (done.returncode, done.stdout) == (0, "4\n")
    assert "damaged" not in done.stderr
    assert (damaged(tmp_path), total(tmp_path)) == (0, 1)


def test_no_file_is_no_counts(tmp_path: Path) -> None:
    assert total(tmp_path / "missing") == -1
