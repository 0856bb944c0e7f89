# SPDX-License-Identifier: Apache-2.0
"""New files in old ones' places: on file systems without locks or O_TMPFILE, and what is kept."""

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from imageserver.backends.file import replacement
from imageserver.backends.file.replacement import NewFile, check_target, copy_attributes, sweep
from tests.unit.shortages import open_descriptors


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[int]:
    """An open, empty directory, with nothing left open behind the test."""
    before = open_descriptors()
    fd = os.open(tmp_path, os.O_RDONLY)
    yield fd
    os.close(fd)
    assert open_descriptors() <= before


@pytest.fixture(params=["O_TMPFILE", "named"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With nameless files, or on a file system that has none, such as NFS."""
    kind: str = request.param
    if kind == "named":
        _without_tmpfile(monkeypatch)
    return kind


def _without_tmpfile(monkeypatch: pytest.MonkeyPatch) -> None:
    really = os.open

    def opening(path: bytes, flags: int, *args: int, **kwargs: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "no O_TMPFILE")
        return really(path, flags, *args, **kwargs)

    monkeypatch.setattr(replacement.os, "open", opening)


def _failing(number: int) -> Callable[..., None]:
    def fail(*_args: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def _put(directory: int, name: bytes, text: bytes) -> None:
    with NewFile(directory) as new:
        os.write(new.fd, text)
        new.rename(name)


@pytest.mark.usefixtures("kind")
def test_a_new_file_is_its_owners_alone_whatever_the_umask(tmp_path: Path, directory: int) -> None:
    for mask in (0, 0o777):
        before = os.umask(mask)
        try:
            _put(directory, b"x", b"new")
        finally:
            os.umask(before)
        assert (tmp_path / "x").stat().st_mode == 0o100600


@pytest.mark.usefixtures("kind")
def test_a_file_that_is_not_renamed_is_gone(tmp_path: Path, directory: int) -> None:
    with NewFile(directory):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_where_there_are_no_locks_a_file_is_replaced_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, directory: int, number: int
) -> None:
    monkeypatch.setattr(fcntl, "flock", _failing(number))
    with NewFile(directory) as new:
        assert [p.name[-14:] for p in tmp_path.iterdir()] in ([], [".unlocked.part"])
        sweep(directory)
        new.rename(b"x")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize("number", [errno.EIO, errno.EINTR])
def test_a_lock_that_fails_otherwise_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, directory: int, number: int
) -> None:
    monkeypatch.setattr(fcntl, "flock", _failing(number))
    with pytest.raises(OSError, match=os.strerror(number)):
        NewFile(directory)
    assert list(tmp_path.iterdir()) == []


def test_only_abandoned_files_are_swept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, directory: int
) -> None:
    _without_tmpfile(monkeypatch)
    with NewFile(directory):
        (living,) = (p.name for p in tmp_path.iterdir())
        (tmp_path / ".imageserver-dead.part").touch(0o400)
        (tmp_path / ".imageserver-young.unlocked.part").touch()
        (tmp_path / ".imageserver-old.unlocked.part").touch()
        day_ago = time.time() - 90_000
        os.utime(tmp_path / ".imageserver-old.unlocked.part", (day_ago, day_ago))
        (tmp_path / "disk.part").touch()

        sweep(directory)

        left = {living, ".imageserver-young.unlocked.part", "disk.part"}
        assert {p.name for p in tmp_path.iterdir()} == left


def test_abandoned_files_are_swept_where_a_lock_needs_a_writable_descriptor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, directory: int
) -> None:
    really = fcntl.flock

    def flock(fd: int, operation: int) -> None:  # as NFS does it: flock(2)
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        really(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    (tmp_path / ".imageserver-dead.part").touch(0o600)
    sweep(directory)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("when", ["before its lock", "while it is being locked"])
def test_a_file_that_is_swept_before_it_is_locked_is_made_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, directory: int, when: str
) -> None:
    _without_tmpfile(monkeypatch)
    really = fcntl.flock
    taken: list[str] = []

    def flock(fd: int, operation: int) -> None:
        if not taken:
            taken.extend(p.name for p in tmp_path.iterdir())
            (tmp_path / taken[0]).unlink()
            if when == "while it is being locked":
                raise BlockingIOError(errno.EAGAIN, "locked by the sweep")
        really(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    _put(directory, b"x", b"new")
    assert taken
    assert (tmp_path / "x").read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


class _Attributes:
    """Extended attributes of two files, as a file system keeps them; some cannot be set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *fixed: bytes) -> None:
        self.of: dict[int, dict[bytes, bytes]] = {}
        self._fixed = fixed
        monkeypatch.setattr(os, "listxattr", lambda fd: [n.decode() for n in self.of[fd]])
        monkeypatch.setattr(os, "getxattr", lambda fd, name: self.of[fd][name])
        monkeypatch.setattr(os, "setxattr", self._set)
        monkeypatch.setattr(os, "removexattr", lambda fd, name: self.of[fd].pop(name))

    def _set(self, fd: int, name: bytes, value: bytes) -> None:
        if name in self._fixed:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        self.of[fd][name] = value


@pytest.fixture
def two(tmp_path: Path) -> Iterator[tuple[int, int]]:
    """An old file and a new one."""
    pair = [os.open(tmp_path / name, os.O_CREAT | os.O_RDWR, 0o600) for name in ("old", "new")]
    os.fchmod(pair[0], 0o640)
    yield pair[0], pair[1]
    for fd in pair:
        os.close(fd)


def test_attributes_become_those_of_the_old_file(
    monkeypatch: pytest.MonkeyPatch, two: tuple[int, int]
) -> None:
    old, new = two
    place = _Attributes(monkeypatch)
    place.of[old] = {b"user.a": b"1", b"user.b": b"2"}
    place.of[new] = {b"user.b": b"other", b"system.posix_acl_access": b"from the directory"}
    copy_attributes(old, new)
    assert place.of[new] == place.of[old]
    assert os.fstat(new).st_mode == 0o100640


def test_an_attribute_that_is_right_already_is_not_set(
    monkeypatch: pytest.MonkeyPatch, two: tuple[int, int]
) -> None:
    old, new = two
    place = _Attributes(monkeypatch, b"security.selinux")  # it comes from the mount
    place.of[old] = {b"security.selinux": b"label"}
    place.of[new] = {b"security.selinux": b"label"}
    copy_attributes(old, new)

    place.of[new] = {b"security.selinux": b"other"}
    with pytest.raises(OSError, match=os.strerror(errno.EOPNOTSUPP)):
        copy_attributes(old, new)


def test_a_label_that_the_old_file_lacks_stays(
    monkeypatch: pytest.MonkeyPatch, two: tuple[int, int]
) -> None:
    old, new = two
    place = _Attributes(monkeypatch)
    place.of = {old: {}, new: {b"security.selinux": b"label"}}
    copy_attributes(old, new)
    assert place.of[new] == {b"security.selinux": b"label"}


def test_a_directory_that_takes_the_files_place_is_left_as_it_is(
    directory: int, tmp_path: Path
) -> None:
    (tmp_path / "image").touch()
    old = os.open(tmp_path / "image", os.O_RDONLY)
    (tmp_path / "image").rename(tmp_path / "away")
    (tmp_path / "image").mkdir(0o751)
    (tmp_path / "image").chmod(0o751)
    before = (tmp_path / "image").stat()

    with pytest.raises(IsADirectoryError):
        check_target(directory, b"image", old)
    assert (tmp_path / "image").stat() == before
    os.close(old)


def test_a_directory_that_comes_while_the_name_is_tried_is_there_afterwards(
    directory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "image").touch()
    old = os.open(tmp_path / "image", os.O_RDONLY)
    really = os.rmdir

    def late(name: bytes, *, dir_fd: int) -> None:
        (tmp_path / "image").rename(tmp_path / "away")
        (tmp_path / "image").mkdir()
        really(name, dir_fd=dir_fd)

    monkeypatch.setattr(os, "rmdir", late)
    with pytest.raises(IsADirectoryError):
        check_target(directory, b"image", old)
    assert (tmp_path / "image").stat().st_mode & 0o7777 == 0o700
    os.close(old)
