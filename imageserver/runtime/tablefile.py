# SPDX-License-Identifier: Apache-2.0
"""The slot table's file: found or made by the first process of a server, the same one for all.

The first process opens it by its path and keeps it open (``RuntimeDirectory.keep``); it and its
children open it anew from that descriptor. So all processes of a server have one table, even if
another file, or none, is at the path by then.

Every process that has the table mapped holds shared locks on a second file, ``slots.use``, and on
the directory itself. Only a process that gets both locks exclusively may replace a table it cannot
read. (One is not enough: the file may be removed, and then be made and locked by another server.)
"""

import contextlib
import fcntl
import logging
import mmap
import os
import time

from imageserver.core import slots
from imageserver.core.slots import ForeignTable, IncompatibleTable, SlotTable
from imageserver.runtime.directory import RuntimeDirectory
from imageserver.runtime.flock import try_flock
from imageserver.runtime.private import close_fd, open_private
from imageserver.runtime.processes import boot_id, namespace

log = logging.getLogger(__name__)

TABLE = "slots"
_USE = "slots.use"
_NEW = "slots.new"
#: Workers look after the header every second.
_MEND_SECONDS = 3.0
_MEND_STEP_SECONDS = 0.05
#: Another version's table, or a damaged one; one cut short meanwhile; none.
_UNREADABLE = (IncompatibleTable, ValueError, FileNotFoundError)


def random_count() -> int:
    """Return 64 bits from which deaths are counted: see ``slots.Deaths``."""
    return int.from_bytes(os.urandom(8), "big")


def reopen(runtime: RuntimeDirectory) -> tuple[int, int]:
    """Open ``slots.use``, locked, and the table, each with a description of its own (open(2)).

    Raises:
        IncompatibleTable: the table cannot be read, and others use it.
        OSError, StateUnavailable: the directory cannot be used.
    """
    with contextlib.ExitStack() as opened:
        use = runtime.reopen(_USE)
        if use is None:
            _find(runtime)
            use = runtime.reopen(_USE)
        assert use is not None  # noqa: S101 - kept now
        opened.callback(close_fd, use)
        file = runtime.reopen(TABLE)
        assert file is not None  # noqa: S101 - kept together
        opened.callback(close_fd, file)
        fcntl.flock(use, fcntl.LOCK_SH)
        opened.pop_all()
    return use, file


def examine(directory: str) -> None:
    """Prove that a server could use the table in a directory, or make one. Changes nothing.

    Where other processes use one that cannot be read, wait a while for them to mend it.

    Raises:
        IncompatibleTable: they do not, or it was removed.
        OSError: the directory cannot be used.
    """
    deadline = time.monotonic() + _MEND_SECONDS
    while True:
        try:
            close_fd(_open_readable(directory))
        except _UNREADABLE as exc:
            if not is_used(directory):
                return
            if time.monotonic() > deadline:
                raise IncompatibleTable(_why_not(directory, exc)) from exc
            time.sleep(_MEND_STEP_SECONDS)
        else:
            return


def is_used(directory: str) -> bool:
    """Tell whether a process has the table of this directory open. Changes nothing."""
    return _is_locked(directory, os.O_RDONLY | os.O_DIRECTORY) or _is_locked(
        os.path.join(directory, _USE), os.O_RDWR
    )


def _is_locked(path: str, flags: int) -> bool:
    try:
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return not try_flock(fd)
    finally:
        close_fd(fd)


def is_alone(runtime: RuntimeDirectory) -> bool:
    """Tell whether no other process has the table open that this one keeps, and has not mapped."""
    held = (runtime.kept(_USE), runtime.top.fileno())
    try:
        return all(try_flock(fd) for fd in held)
    finally:
        for fd in held:
            fcntl.flock(fd, fcntl.LOCK_SH)


def map_kept(file: int) -> tuple[mmap.mmap, SlotTable]:
    """Map the table that this server has found at its start, and mend its header if need be."""
    try:
        return _map(file)
    except IncompatibleTable:
        with mmap.mmap(file, slots.SIZE) as damaged, memoryview(damaged) as view:
            slots.mend_header(view, boot_id(), namespace(), random_count())
        log.warning("slot table: a damaged header was mended")
        return _map(file)


def _find(runtime: RuntimeDirectory) -> None:
    """Open the table by its path and keep it; make or replace it where no process uses it.

    Where other processes use one that cannot be read, wait a while for them to mend it or to end.

    Raises:
        IncompatibleTable: they do neither.
    """
    use = open_private(runtime.path, _USE)
    held = (use, runtime.top.fileno())
    deadline = time.monotonic() + _MEND_SECONDS
    try:
        while True:
            _make_table_if_alone(runtime, held)
            try:
                file = _open_readable(runtime.path)
            except _UNREADABLE as exc:
                if time.monotonic() > deadline:
                    raise IncompatibleTable(_why_not(runtime.path, exc)) from exc
            else:
                runtime.keep(TABLE, file)
                runtime.keep(_USE, use)
                return
            for fd in held:
                fcntl.flock(fd, fcntl.LOCK_UN)  # a process that waits does not use it
            time.sleep(_MEND_STEP_SECONDS)
    except BaseException:
        for fd in held:
            fcntl.flock(fd, fcntl.LOCK_UN)
        close_fd(use)
        raise


def _why_not(directory: str, exc: Exception) -> str:
    if isinstance(exc, ForeignTable):
        return (
            f"{directory} is used by a server in another PID namespace (another container), "
            "whose processes look dead from here; stop it first, or choose another directory"
        )
    if isinstance(exc, FileNotFoundError):
        return (
            f"the slot table in {directory} was removed under a server that still runs; "
            "stop it first, or choose another directory"
        )
    return (
        f"the slot table in {directory} belongs to another version of this "
        "server that still runs; stop it first, or choose another directory"
    )


def _make_table_if_alone(runtime: RuntimeDirectory, held: tuple[int, int]) -> None:
    """Make a table where there is none that can be read, and no process has one open.

    Never in place: a process that has the old file mapped, without the locks, would get SIGBUS.
    """
    if all(try_flock(fd) for fd in held):
        try:
            close_fd(_open_readable(runtime.path))
        except _UNREADABLE:
            _make_table(runtime.path)
    for fd in held:
        fcntl.flock(fd, fcntl.LOCK_SH)


def _make_table(directory: str) -> None:
    fd = open_private(directory, _NEW)
    table = os.path.join(directory, TABLE)
    try:
        os.ftruncate(fd, 0)
        # Before it is mapped: touching a page for which the disk has no room is SIGBUS.
        os.posix_fallocate(fd, 0, slots.SIZE)
        with mmap.mmap(fd, slots.SIZE) as fresh, memoryview(fresh) as view:
            where, first = (boot_id(), namespace()), random_count()
            slots.format_table(view, *where, first)
            if os.path.lexists(table):  # with the records of some that died, perhaps
                slots.mend_header(view, *where, first)
        os.rename(os.path.join(directory, _NEW), table)
    except BaseException:
        os.unlink(os.path.join(directory, _NEW))
        raise
    finally:
        close_fd(fd)


def _open_readable(directory: str) -> int:
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    file = os.open(os.path.join(directory, TABLE), flags)
    with contextlib.ExitStack() as opened:
        opened.callback(close_fd, file)
        if os.fstat(file).st_size != slots.SIZE:
            raise IncompatibleTable("its size is another")
        mapped, table = _map(file)
        table.close()
        mapped.close()
        opened.pop_all()
    return file


def _map(file: int) -> tuple[mmap.mmap, SlotTable]:
    mapped = mmap.mmap(file, slots.SIZE)
    view = memoryview(mapped)
    try:
        return mapped, SlotTable(view, boot_id(), namespace())
    except IncompatibleTable:
        view.release()  # which the mapping demands before it can be closed
        mapped.close()
        raise
