# SPDX-License-Identifier: Apache-2.0
"""imagectl download: what --verify finds out, and whom the lock keeps out."""

import contextlib
import errno
import itertools
import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from imageserver.client.failures import Different, Failed, InUse, LocalFailure
from imageserver.client.http.access import Access
from imageserver.client.http.remote import Extent, Remote
from imageserver.client.local import files
from imageserver.client.local.raw import RawFile
from imageserver.client.moving import resume, target
from imageserver.client.moving.download import download
from imageserver.client.moving.file_locks import claimed
from imageserver.client.moving.wanted import Wanted, check_file
from imageserver.client.showing.progress import Silent
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
    assert (result.data, result.verified_by) == (0, "samples")
    length = ZEROS[1] - ZEROS[0]
    assert file.read_bytes() == b"x" * ZEROS[0] + bytes(length) + b"x" * (SIZE - ZEROS[1])
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize(
    ("bitmap", "why"),
    [(None, " (there may be no bitmap)"), ("", ": the server uses no bitmap"), ("b0", "")],
)
def test_that_all_has_changed_is_told_and_why(file: Path, bitmap: str | None, why: str):
    class _Changed(Remote):
        def extents(self, context: str = "zero") -> Generator[Extent]:
            self.bitmap = bitmap
            yield 0, SIZE, True, context == "dirty"

    class _Noted(Silent):
        def note(self, sentence: str) -> None:
            notes.append(sentence)

    notes: list[str] = []
    with liar("") as url, contextlib.closing(_Changed(Access(url))) as remote:
        download(remote, Wanted(str(file), incremental=True), _Noted())
    assert notes == [f"All of the image counts as changed{why}."]


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


def test_what_was_lost_in_a_failed_sync_does_not_count_as_done(
    file: Path, monkeypatch: pytest.MonkeyPatch
):
    """The kernel says once that pages are lost: the sync before the state is the second one."""
    synced = []

    def fails_once(fd: int) -> None:
        synced.append(fd)
        if len(synced) == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", fails_once)
    file.unlink()
    with (
        liar("") as url,
        contextlib.closing(Remote(Access(url))) as remote,
        pytest.raises(LocalFailure, match="Input/output error"),
    ):
        download(remote, Wanted(str(file)), Silent())
    saved = resume.State(f"{file}.part.state").load()
    assert saved is not None
    assert saved.done == []


def test_a_part_that_another_program_has_open_keeps_its_state(
    file: Path, monkeypatch: pytest.MonkeyPatch
):
    def in_use(*_: object, **__: object) -> None:
        raise InUse("in use")

    state = resume.State(f"{file}.part.state")
    with liar("") as url, contextlib.closing(Remote(Access(url))) as remote:
        monkeypatch.setattr(target.Target, "finish", in_use)
        with pytest.raises(InUse):
            download(remote, Wanted(str(file), force=True), Silent())
        before = state.load()
        assert before
        monkeypatch.setattr(target, "open_image", in_use)
        with pytest.raises(InUse):
            download(remote, Wanted(str(file), force=True), Silent())
    assert state.load() == before


def test_a_file_that_is_called_as_a_part_but_has_no_state_is_left_alone(file: Path):
    part = file.rename(f"{file}.part")
    with (
        liar("") as url,
        contextlib.closing(Remote(Access(url))) as remote,
        pytest.raises(LocalFailure, match=r"copy.part is not what a download has left"),
    ):
        download(remote, Wanted(str(file)), Silent())
    assert part.read_bytes() == b"x" * SIZE


def test_no_part_is_left_that_could_be_taken_for_an_image(tmp_path: Path):
    """The state's name is too long: there is none that says what the part is."""
    file = tmp_path / ("n" * 245)
    with (
        liar("") as url,
        contextlib.closing(Remote(Access(url))) as remote,
        pytest.raises(LocalFailure, match="File name too long"),
    ):
        download(remote, Wanted(str(file)), Silent())
    assert not list(tmp_path.iterdir())


def test_no_other_download_has_the_part_while_it_is_renamed(
    file: Path, monkeypatch: pytest.MonkeyPatch
):
    renamed = []

    def rename_new(old: str, new: str) -> None:
        for path, is_there in ((old, True), (new, False)):
            assert Path(path).exists() == is_there
        with pytest.raises(LocalFailure, match="another download"), claimed(old, is_part=True):
            pass
        files.rename_new(old, new)
        with pytest.raises(LocalFailure, match="another download"), claimed(new, is_part=False):
            pass
        renamed.append(new)

    monkeypatch.setattr(target, "rename_new", rename_new)
    file.unlink()
    with liar("") as url, contextlib.closing(Remote(Access(url))) as remote:
        download(remote, Wanted(str(file)), Silent())
    assert renamed == [str(file)]
    assert list(file.parent.iterdir()) == [file]


def test_what_a_program_has_open_is_not_replaced(tmp_path: Path):
    """As /dev/stdout is, where it leads to a file."""
    with (tmp_path / "output").open("w") as file:
        for link in ("direct", "over another"):
            (tmp_path / link).symlink_to(
                f"/proc/self/fd/{file.fileno()}" if link == "direct" else "direct"
            )
            with pytest.raises(LocalFailure, match="is what a program has open, by /proc/self/fd"):
                check_file(Wanted(str(tmp_path / link), force=True))


@pytest.mark.parametrize("path", ["/dev/null", "fifo", "to a fifo", "."])
def test_what_is_no_file_is_not_replaced(tmp_path: Path, path: str):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "to a fifo").symlink_to("fifo")
    with pytest.raises(LocalFailure, match="is no regular file"):
        check_file(Wanted(str(tmp_path / path), force=True))


def test_what_became_a_fifo_meanwhile_is_not_replaced(file: Path):
    class _Late(Remote):
        def size(self) -> int:
            if file.is_file():
                file.unlink()
                os.mkfifo(file)
            return super().size()

    wanted = Wanted(str(file), force=True)
    with (
        liar("") as url,
        contextlib.closing(_Late(Access(url))) as remote,
        pytest.raises(LocalFailure, match="is no regular file"),
    ):
        download(remote, wanted, Silent())
    assert file.is_fifo()


@pytest.mark.parametrize(("mode", "meanwhile"), [(0o600, 0o600), (0o444, 0o644), (0o400, 0o600)])
def test_what_replaces_a_private_file_is_private_from_the_beginning(
    file: Path, mode: int, meanwhile: int
):
    """Until it is complete, its owner may write it."""

    class _Looking(Remote):
        def read(self, start: int, stop: int) -> Generator[bytes | bytearray]:
            modes.add(Path(f"{file}.part").stat().st_mode & 0o777)
            return super().read(start, stop)

    modes: set[int] = set()
    file.chmod(mode)
    with liar("") as url, contextlib.closing(_Looking(Access(url))) as remote:
        download(remote, Wanted(str(file), force=True), Silent())
    assert (modes, file.stat().st_mode & 0o777) == ({meanwhile}, mode)


def test_a_file_without_a_name_is_refused():
    with pytest.raises(LocalFailure, match="FILE is empty: name the file"):
        check_file(Wanted(""))


def test_extents_without_end_are_not_kept(file: Path):
    class _Endless(Remote):
        def extents(self, context: str = "zero") -> Generator[Extent]:
            for start in itertools.count(0, SIZE):
                assert start < 4 * SIZE
                yield start, SIZE, False, False

    with (
        liar("") as url,
        contextlib.closing(_Endless(Access(url))) as remote,
        pytest.raises(Failed, match=f"the extents end at {2 * SIZE}, the image at {SIZE}"),
    ):
        download(remote, Wanted(str(file), force=True), Silent())


def test_that_a_part_is_wrong_is_noted_on_a_full_disk_as_well(
    file: Path, monkeypatch: pytest.MonkeyPatch
):
    """The state of the part must not go on to say that all of it is done."""

    def differs(_target: target.Target) -> None:
        monkeypatch.setattr(resume.State, "save", _full)
        raise Different("the base was changed")

    monkeypatch.setattr(target.Target, "check_base", differs)
    with (
        liar("") as url,
        contextlib.closing(Remote(Access(url))) as remote,
        pytest.raises(Different, match="the next run fetches all again"),
    ):
        download(remote, Wanted(str(file), force=True), Silent())
    state = resume.State(f"{file}.part.state")
    assert (state.exists(), state.load()) == (True, None)


def _full(*_: object) -> None:
    raise LocalFailure("No space left on device")
