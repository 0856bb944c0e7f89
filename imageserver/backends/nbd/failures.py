# SPDX-License-Identifier: Apache-2.0
"""What the failures of an NBD server are for us, by the number that libnbd gives them."""

import errno

from imageserver.core.errors import (
    NO_DESCRIPTOR,
    BackendError,
    BackendTimeout,
    Exhausted,
    ImageServerError,
    NoSpace,
)


class NotSupported(BackendError):
    """The server declines this request, as NBD_CMD_FLAG_FAST_ZERO lets it (NBD_ENOTSUP)."""


class Stopped(BackendError):
    """Nobody wants the answer any more: see ``Link.stopped``."""


class TryAgain(BackendError):
    """The server's backlog is full (EAGAIN), or its socket is another one by now.

    connect(2) on a Unix socket does not wait.
    """


class TurnedAway(BackendError):
    """The server hung up before it had greeted us: it may have no room for another client."""


_ERRORS: dict[int, type[ImageServerError]] = {
    errno.ENOSPC: NoSpace,
    errno.EDQUOT: NoSpace,
    errno.EOPNOTSUPP: NotSupported,
    errno.ETIMEDOUT: BackendTimeout,
    errno.EAGAIN: TryAgain,
    **dict.fromkeys(NO_DESCRIPTOR, Exhausted),
}


def translated(exc: Exception, name: str) -> ImageServerError:
    """Return our error for an ``nbd.Error`` of the export that ``name`` names."""
    cls = _ERRORS.get(getattr(exc, "errnum", 0), BackendError)
    return cls(f"{name}: {exc}")
