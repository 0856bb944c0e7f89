# SPDX-License-Identifier: Apache-2.0
"""Files of counts that others cut or remove, or that a disk has no room for: nothing is lost."""

import contextlib
import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from imageserver.observability.metrics import numbers, stored
from imageserver.observability.metrics.counted import Metrics
from imageserver.observability.metrics.numbers import files
from tests.unit.counting import ROOT, Process, damaged, processes, total


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    with processes(tmp_path) as start_one:
        yield start_one


@pytest.fixture
def metrics(tmp_path: Path) -> Iterator[Metrics]:
    """Return metrics of this process, which have counted one connection, in a place to remove."""
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


def _remove_locks(directory: Path) -> None:
    for path in directory.glob("[0-9]"):
        path.unlink()


LOSSES = [_remove_locks, _cut, _cut_in_an_entry, _remove_files, _remove_all]


@pytest.mark.parametrize("lose", LOSSES)
def test_what_is_lost_is_written_anew(
    metrics: Metrics, tmp_path: Path, lose: Callable[[Path], None]
) -> None:
    directory = tmp_path / "counts"
    lose(directory)
    metrics.accepted()
    metrics.flush()
    metrics.accepted()
    metrics.flush()

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
    metrics.flush()

    assert total(directory) == 3


@pytest.mark.parametrize("module", [numbers, stored], ids=["to look", "to count"])
def test_what_another_has_counted_outlives_a_lack_of_descriptors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: ModuleType
) -> None:
    """It was taken for damaged, and removed, or written over by who could open it later."""
    directory = tmp_path / "counts"
    with contextlib.closing(Metrics(str(directory))) as before:
        before.accepted()

    def refuse(*_: object) -> int:
        raise OSError(errno.EMFILE, "no descriptor is free")

    with contextlib.closing(Metrics(str(directory))) as metrics:
        with monkeypatch.context() as patch:
            patch.setattr(module, "read_regular" if module is numbers else "open_private", refuse)
            metrics.accepted()
            metrics.flush()
        metrics.flush()
        assert total(directory) == 2


#: A process that may write no more than a page of each file: as on a disk that is full.
_FULL = """
import resource, sys
from imageserver.observability.metrics.counted import metrics_in
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
