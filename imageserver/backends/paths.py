# SPDX-License-Identifier: Apache-2.0
"""One name for each path, whatever links lead to it."""

import contextlib
import errno
import os

from imageserver.backends.descriptors import close_fd
from imageserver.core.transfer import path_bytes

#: How often a path is resolved that changes meanwhile.
_LOOKS = 10


def resolved(path: str) -> bytes:
    """Return a path without links. What is missing at its end is no error."""
    return resolved_name(path_bytes(path))


def resolved_name(name: bytes) -> bytes:
    """Return a path without links, as ``resolved``."""
    found = _resolved_by_kernel(name)
    if found:
        return found
    for _ in range(_LOOKS):
        with contextlib.suppress(OSError):  # a link that is none any more when it is read
            return _resolved(name)
    return os.path.normpath(name)  # it changes all the time, and will not be opened either


def _resolved_by_kernel(name: bytes) -> bytes | None:
    """Return where the kernel finds a path that leads to something; None where it cannot say.

    Three system calls however deep the path, and no link can be moved in the middle of it.
    """
    try:
        fd = os.open(name, os.O_PATH | os.O_CLOEXEC)
    except (OSError, ValueError):
        return None
    try:
        found = os.readlink(b"/proc/self/fd/%d" % fd)
    except OSError:
        return None
    finally:
        close_fd(fd)
    # What has no name says so in its place: "socket:[1]", "(unreachable)/x", "/x (deleted)".
    return found if found.startswith(b"/") and not found.endswith(b" (deleted)") else None


def _resolved(name: bytes) -> bytes:
    try:
        return os.path.realpath(name, strict=True)
    except OSError as exc:
        if exc.errno == errno.EINVAL:  # readlink(2): no link; else Python 3.14 would ignore it
            raise
        return os.path.realpath(name)  # not all of it is there
