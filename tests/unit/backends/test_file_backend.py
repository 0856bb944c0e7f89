# SPDX-License-Identifier: Apache-2.0
"""The file backend where the system fails: before the body, in it, behind the exchange."""

import errno
import fcntl
import os
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from imageserver.backends.file import replacement
from imageserver.backends.file.image import ImageFiles
from imageserver.backends.file.kind import FileImage
from imageserver.core.errors import FileAccessError, NoSpace
from imageserver.core.ports import Intent
from imageserver.core.sources import HasFileno

OLD, NEW = b"old", b"new!"


class Body:
    """A client's body, and how much of it has been asked for."""

    def __init__(self) -> None:
        self.asked = 0
        self.on_read: Callable[[], None] = lambda: None

    def readinto(self, buffer: memoryview, until: HasFileno | None = None) -> int:
        assert until
        self.on_read()
        count = min(len(buffer), len(NEW) - self.asked)
        buffer[:count] = NEW[self.asked : self.asked + count]
        self.asked += count
        return count

    def verify(self, written: int = 0) -> None: ...


@pytest.fixture
def image(tmp_path: Path) -> Path:
    image = tmp_path / "image"
    image.write_bytes(OLD)
    image.chmod(0o640)
    return image


@pytest.fixture(autouse=True)
def _nothing_stays_open() -> Iterator[None]:
    before = set(os.listdir("/proc/self/fd"))
    yield
    for thread in threading.enumerate():
        if thread.name == "close":  # a replaced file's last descriptor
            thread.join(10)
    assert set(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize("intent", [Intent.READ, Intent.REPLACE])
@pytest.mark.parametrize("is_pinned", [False, True], ids=["named", "pinned"])
@pytest.mark.parametrize(
    "target",
    ["/proc/self/fd/{fd}", "/dev/fd/{fd}", "/proc/self/exe", "/proc/version", "/sys/kernel/notes"],
)
def test_what_lies_in_proc_or_sys_or_is_reached_through_them_is_no_image(
    image: Path, tmp_path: Path, target: str, is_pinned: bool, intent: Intent
) -> None:
    (tmp_path / "link").symlink_to("deep")
    with image.open("rb") as file:
        path = target.format(fd=file.fileno())
        (tmp_path / "deep").symlink_to(path)
        for name in (path, str(tmp_path / "link")):
            named = FileImage(name)
            with pytest.raises(FileAccessError, match=r"lies in (proc|sysfs), where no image is"):
                ImageFiles(4096).open(named.pinned() if is_pinned else named, intent)


def test_links_without_end_are_refused(image: Path) -> None:
    links = [image.with_name(f"link{number}") for number in range(42)]
    for link, to in zip(links, [*links[1:], image], strict=True):
        link.symlink_to(to)

    ImageFiles(4096).open(FileImage(str(links[2])), Intent.READ).close()
    with pytest.raises(FileAccessError, match="Too many levels"):
        ImageFiles(4096).open(FileImage(str(links[0])), Intent.READ)


def _put(image: Path, body: Body, length: int = len(NEW)) -> None:
    backend = ImageFiles(4096).open(FileImage(str(image)), Intent.REPLACE)
    try:
        for _ in backend.replace(length, body):
            pass
    finally:
        backend.close()


def _raise(number: int) -> Callable[..., None]:
    def fail(*_args: object, **_kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def _unlistable(monkeypatch: pytest.MonkeyPatch) -> None:
    really = os.open

    def opening(path: bytes, flags: int, *args: int, **kwargs: int) -> int:
        if path == b"." and not flags & os.O_TMPFILE & ~os.O_DIRECTORY:
            _raise(errno.EACCES)()
        return really(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", opening)


#: What may be forbidden, and which call says so.
FORBIDDEN: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "the directory cannot be synced": _unlistable,
    "the target is immutable": lambda m: m.setattr(os, "rmdir", _raise(errno.EPERM)),
    "the target is a mount point": lambda m: m.setattr(
        replacement, "_mount_of", lambda fd: b"%d" % fd
    ),
    "the mode cannot be kept": lambda m: m.setattr(os, "fchmod", _raise(errno.EPERM)),
    "the attributes cannot be read": lambda m: m.setattr(os, "listxattr", _raise(errno.EACCES)),
    "the file system's files are smaller": lambda m: m.setattr(
        os, "lseek", lambda *where: 3 if where[-1] == os.SEEK_END else _raise(errno.EINVAL)()
    ),
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_what_forbids_a_replacement_is_found_before_the_body_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, image: Path, name: str
) -> None:
    body = Body()
    with monkeypatch.context() as patched:
        FORBIDDEN[name](patched)
        with pytest.raises(FileAccessError):
            _put(image, body)
    assert body.asked == 0
    assert [p.name for p in image.parent.iterdir()] == ["image"]
    assert image.read_bytes() == OLD


def test_no_place_for_a_new_file_is_no_space_before_the_body_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, image: Path
) -> None:
    body = Body()
    monkeypatch.setattr("imageserver.backends.file.image.NewFile", _raise(errno.ENOSPC))
    with pytest.raises(NoSpace):
        _put(image, body)
    assert body.asked == 0


def test_until_it_is_complete_a_new_file_is_its_owners_alone(
    monkeypatch: pytest.MonkeyPatch, image: Path
) -> None:
    really = os.open

    def opening(path: bytes, flags: int, *args: int, **kwargs: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            _raise(errno.EOPNOTSUPP)()
        return really(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", opening)
    seen: list[int] = []

    def look() -> None:
        seen.extend(p.stat().st_mode for p in image.parent.glob(".imageserver-*.part"))

    body = Body()
    body.on_read = look
    _put(image, body)
    assert set(seen) == {stat.S_IFREG | 0o600}
    assert (image.read_bytes(), image.stat().st_mode) == (NEW, stat.S_IFREG | 0o640)


def test_where_modes_are_the_mounts_a_file_is_replaced_all_the_same(
    monkeypatch: pytest.MonkeyPatch, image: Path
) -> None:
    was = os.stat(image)
    times = {name: getattr(was, name) for name in dir(was) if name.endswith("_ns")}
    found = os.stat_result((stat.S_IFREG | 0o755, *was[1:]), times)  # as FAT has it
    really = os.fstat
    monkeypatch.setattr(
        os, "fstat", lambda fd: found if stat.S_ISREG(really(fd).st_mode) else really(fd)
    )
    monkeypatch.setattr(os, "fchmod", _raise(errno.EPERM))
    _put(image, Body())
    assert image.read_bytes() == NEW


@pytest.fixture
def unsyncable(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Let directories fail to sync, after what is given has been done."""
    really = os.fsync

    def prepare(first: Callable[[], None]) -> None:
        def syncing(fd: int) -> None:
            if stat.S_ISDIR(os.fstat(fd).st_mode):
                first()
                _raise(errno.EIO)()
            really(fd)

        monkeypatch.setattr(os, "fsync", syncing)

    return prepare


def test_where_the_sync_behind_the_exchange_fails_the_old_file_is_put_back(
    image: Path, unsyncable: Callable[[Callable[[], None]], None]
) -> None:
    seen: list[bytes] = []

    def another_replacement_sweeps() -> None:
        seen.append(image.read_bytes())
        directory = os.open(image.parent, os.O_RDONLY)
        replacement.sweep(directory)
        os.close(directory)

    unsyncable(another_replacement_sweeps)
    before = image.stat()
    with pytest.raises(FileAccessError, match="Input/output error"):
        _put(image, Body())
    assert seen == [NEW], "or this test proves nothing"
    after = image.stat()
    assert (after.st_ino, after.st_mode, after.st_nlink) == (before.st_ino, before.st_mode, 1)
    assert image.read_bytes() == OLD
    assert [p.name for p in image.parent.iterdir()] == ["image"]


def test_where_the_sync_behind_the_exchange_fails_a_file_that_was_not_there_is_gone(
    image: Path, unsyncable: Callable[[Callable[[], None]], None]
) -> None:
    image.unlink()
    unsyncable(lambda: None)
    with pytest.raises(FileAccessError, match="Input/output error"):
        _put(image, Body())
    assert list(image.parent.iterdir()) == []


def test_what_somebody_else_has_put_in_the_place_meanwhile_stays(
    image: Path, unsyncable: Callable[[Callable[[], None]], None]
) -> None:
    def others_replace() -> None:
        other = image.with_name("other")
        other.write_bytes(b"theirs")
        other.rename(image)

    unsyncable(others_replace)
    with pytest.raises(FileAccessError, match="Input/output error"):
        _put(image, Body())
    assert image.read_bytes() == b"theirs"
    assert [p.name for p in image.parent.iterdir()] == ["image"]


def test_without_hard_links_the_new_file_stays_where_the_last_sync_fails(
    monkeypatch: pytest.MonkeyPatch,
    image: Path,
    unsyncable: Callable[[Callable[[], None]], None],
) -> None:
    really = os.link

    def linking(source: bytes, *args: Any, **kwargs: Any) -> None:
        if source.startswith(b"/proc/"):
            _raise(errno.EPERM)()
        really(source, *args, **kwargs)

    monkeypatch.setattr(os, "link", linking)
    unsyncable(lambda: None)
    with pytest.raises(FileAccessError, match="Input/output error"):
        _put(image, Body())
    assert image.read_bytes() == NEW


def test_a_replaced_file_is_left_without_a_name_or_a_lock(image: Path) -> None:
    with image.open("rb") as old:
        _put(image, Body())
        assert os.fstat(old.fileno()).st_nlink == 0
        fcntl.flock(old, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert [p.name for p in image.parent.iterdir()] == ["image"]


def test_what_is_exchanged_between_look_and_opening_is_not_read(
    monkeypatch: pytest.MonkeyPatch, image: Path
) -> None:
    really = os.open

    def opening(path: bytes, flags: int, *args: int, **kwargs: int) -> int:
        if path == b"image":
            image.unlink()
            os.mkfifo(image)
        return really(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", opening)
    with pytest.raises(FileAccessError, match="neither a regular file"):
        ImageFiles(4096).open(FileImage(str(image)), Intent.READ)


def test_a_pinned_file_is_the_one_that_links_led_to_or_none(image: Path) -> None:
    link = image.with_name("link")
    link.symlink_to(image)
    pinned = FileImage(str(link)).pinned()
    link.unlink()
    link.symlink_to("another")
    backend = ImageFiles(4096).open(pinned, Intent.READ)
    assert b"".join(backend.read(0, backend.size)) == OLD
    backend.close()

    image.rename(image.with_name("another"))
    image.symlink_to("another")
    with pytest.raises(FileAccessError, match=r"/image has become a link$"):
        ImageFiles(4096).open(pinned, Intent.READ)
