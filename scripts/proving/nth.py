# SPDX-License-Identifier: Apache-2.0
"""An nbdkit plugin in Python: a disk in memory whose Nth request from now on fails, once.

    control=FILE    "N ERRNO TOKEN": a new token begins to count anew; N is 0: nothing fails
    FILE.failed     the token, written when that request was failed

nbdkit's own error filter fails a share of all requests, but not one that is chosen.
"""

import threading
from pathlib import Path
from typing import Any

import nbdkit  # type: ignore[import-not-found]  # nbdkit has it built in

API_VERSION = 2
SIZE = 1 << 20
_GRANULE = 65536
#: Of the mask that nbdkit's Python plugin takes for extents.
_HOLE_AND_ZERO = 3

_disk = bytearray(SIZE)
_lock = threading.Lock()
_control = Path()
_token = ""
_seen = 0


def config(key: str, value: str) -> None:
    """Take an argument of the command line."""
    global _control  # noqa: PLW0603 - nbdkit's interface has no object
    if key != "control":
        raise RuntimeError(f"unknown parameter {key}")
    _control = Path(value)


def open(_readonly: int) -> int:  # noqa: A001 - nbdkit's name
    """Begin a connection."""
    return 1


def _count() -> None:
    global _token, _seen  # noqa: PLW0603 - as above
    nth, error, token = _control.read_text().split()
    with _lock:
        _seen = 1 if token != _token else _seen + 1
        _token = token
        fails = _seen == int(nth)
    if fails:
        _control.with_name(_control.name + ".failed").write_text(token)
        nbdkit.set_error(int(error))
        raise RuntimeError("it is this one's turn")


def get_size(_handle: int) -> int:
    """Return the disk's size."""
    return SIZE


def can_multi_conn(_handle: int) -> bool:
    """Tell that all connections see one disk."""
    return True


def can_extents(_handle: int) -> bool:
    """Tell that holes are known."""
    return True


def pread(_handle: int, buffer: Any, offset: int, _flags: int) -> None:  # noqa: ANN401
    """Read."""
    _count()
    buffer[:] = _disk[offset : offset + len(buffer)]


def pwrite(_handle: int, buffer: Any, offset: int, _flags: int) -> None:  # noqa: ANN401
    """Write."""
    _count()
    _disk[offset : offset + len(buffer)] = buffer


def zero(_handle: int, count: int, offset: int, _flags: int) -> None:
    """Write zeros."""
    _count()
    _disk[offset : offset + count] = bytes(count)


def flush(_handle: int, _flags: int) -> None:
    """Do nothing: the disk is memory."""
    _count()


def extents(_handle: int, count: int, offset: int, _flags: int) -> list[tuple[int, int, int]]:
    """Tell which parts are zero."""
    _count()
    found = []
    for at in range(offset // _GRANULE * _GRANULE, offset + count, _GRANULE):
        is_zero = not any(_disk[at : at + _GRANULE])
        found.append((at, _GRANULE, _HOLE_AND_ZERO if is_zero else 0))
    return found
