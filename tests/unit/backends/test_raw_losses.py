# SPDX-License-Identifier: Apache-2.0
"""Files that are disks, and are cut short, removed or replaced by others while they are used."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from imageserver.backends.file import zeroing
from imageserver.backends.file.raw import RawFile
from imageserver.core.errors import FileAccessError
from tests.unit.backends.raws import BLOCK, CHANGES, OLD, SIZE, open_raw

#: What reads to the end of the disk.
USES = CHANGES | {
    "read": lambda opened: list(opened.read(0, SIZE)),
    "read behind the end": lambda opened: list(opened.read(SIZE - 10, 10)),
    "extents": lambda opened: list(opened.extents(0, SIZE, dirty=False)),
    "extents behind the end": lambda opened: list(opened.extents(SIZE - 10, SIZE, dirty=True)),
}

GONE = {
    "removed": lambda disk: disk.unlink(),
    "replaced": lambda disk: shutil.copy(disk, f"{disk}.new") and os.replace(f"{disk}.new", disk),
}
gone = pytest.mark.parametrize("go", GONE.values(), ids=list(GONE))


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    disk = tmp_path / "disk"
    disk.write_bytes(OLD)
    return disk


@pytest.mark.parametrize("use", USES.values(), ids=list(USES))
def test_a_file_that_has_become_shorter_is_an_error_and_stays_so(
    disk: Path, use: Callable[[RawFile], object]
) -> None:
    with open_raw(disk) as opened:
        os.truncate(disk, 3 * BLOCK)
        with pytest.raises(FileAccessError, match=f"has become shorter than {SIZE} bytes"):
            use(opened)

    assert disk.stat().st_size == 3 * BLOCK


@gone
@pytest.mark.parametrize("use", [*USES.values(), RawFile.flush], ids=[*USES, "flush"])
def test_a_file_that_has_lost_its_last_name_is_an_error(
    disk: Path, use: Callable[[RawFile], object], go: Callable[[Path], object]
) -> None:
    """... and what has taken its name is left alone."""
    with open_raw(disk) as opened:
        disk.with_name("other").hardlink_to(disk)
        go(disk)
        use(opened)
        disk.with_name("other").unlink()
        now = disk.read_bytes() if disk.exists() else None
        with pytest.raises(FileAccessError, match="disk was removed or replaced"):
            use(opened)

    assert (disk.read_bytes() if disk.exists() else None) == now


@gone
@pytest.mark.parametrize(
    ("call", "use"),
    [
        pytest.param("pwrite", CHANGES["short write"], id="write"),
        pytest.param("_fallocate", CHANGES["zeroing"], id="zero"),
        pytest.param("fsync", RawFile.flush, id="flush"),
    ],
)
def test_a_change_of_a_file_that_loses_its_name_in_the_last_call_is_no_success(
    disk: Path,
    call: str,
    use: Callable[[RawFile], object],
    go: Callable[[Path], object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    where = zeroing if call.startswith("_") else os
    really, is_gone = getattr(where, call), False

    def called(*args: object) -> object:
        nonlocal is_gone
        done = really(*args)
        if not is_gone:
            is_gone = True
            go(disk)
        return done

    with open_raw(disk) as opened, monkeypatch.context() as patched:
        patched.setattr(where, call, called)
        with pytest.raises(FileAccessError, match="disk was removed or replaced"):
            use(opened)
