# SPDX-License-Identifier: Apache-2.0
"""imagectl download: what --verify finds out, and whom the lock keeps out."""

import contextlib
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from imageserver.client import localfile, resume, target
from imageserver.client.access import Access
from imageserver.client.download import download
from imageserver.client.errors import Different, LocalFailure
from imageserver.client.localfile import RawFile, claimed
from imageserver.client.progress import Silent
from imageserver.client.remote import Extent, Remote
from imageserver.client.target import Wanted
from tests.unit.liars import SIZE, ZEROS, liar


class _Zeroed(Remote):
    """Says that nothing but the zeros has changed."""

    def extents(self, context: str = "zero") -> Generator[Extent]:
        assert context == "dirty"
        yield 0, ZEROS[0], False, False
        yield ZEROS[0], ZEROS[1] - ZEROS[0], True, True
        yield ZEROS[1], SIZE - ZEROS[1], False, False


@pytest.fixture
def remote() -> Iterator[_Zeroed]:
    with liar("") as url, contextlib.closing(_Zeroed(Access(url))) as remote:
        yield remote


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """An earlier copy, of bytes that are not zero."""
    path = tmp_path / "copy"
    path.write_bytes(b"x" * SIZE)
    return path


def test_changes_that_are_zeros_are_verified(remote: Remote, file: Path):
    result = download(remote, Wanted(str(file), incremental=True, verify=True), Silent())
    assert (result.data, result.verified) == (0, True)
    length = ZEROS[1] - ZEROS[0]
    assert file.read_bytes() == b"x" * ZEROS[0] + bytes(length) + b"x" * (SIZE - ZEROS[1])
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("left", [0, 1])
def test_zeros_that_did_not_become_zeros_are_found_by_verify(
    remote: Remote, file: Path, monkeypatch: pytest.MonkeyPatch, left: int
):
    def zero(self: RawFile, start: int, stop: int) -> None:
        self.write(start, bytes((stop - start - 1) * left))

    monkeypatch.setattr(RawFile, "zero", zero)
    wanted = Wanted(str(file), incremental=True, verify=True)
    with pytest.raises(Different, match=r"what should be zero .* fetches all again"):
        download(remote, wanted, Silent())
    saved = resume.State(f"{file}.incremental.state").load()
    assert saved is not None
    assert (saved.done, saved.undone) == ([], [ZEROS])
    monkeypatch.undo()
    download(remote, wanted, Silent())
    assert list(file.parent.iterdir()) == [file]


def test_no_other_download_has_the_part_while_it_is_renamed(
    file: Path, monkeypatch: pytest.MonkeyPatch
):
    renamed = []

    def rename_new(old: str, new: str) -> None:
        for path, is_there in ((old, True), (new, False)):
            assert Path(path).exists() == is_there
        with pytest.raises(LocalFailure, match="another download"), claimed(old, is_part=True):
            pass
        localfile.rename_new(old, new)
        with pytest.raises(LocalFailure, match="another download"), claimed(new, is_part=False):
            pass
        renamed.append(new)

    monkeypatch.setattr(target, "rename_new", rename_new)
    file.unlink()
    with liar("") as url, contextlib.closing(Remote(Access(url))) as remote:
        download(remote, Wanted(str(file)), Silent())
    assert renamed == [str(file)]
    assert list(file.parent.iterdir()) == [file]
