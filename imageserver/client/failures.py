# SPDX-License-Identifier: Apache-2.0
"""Every way imagectl can fail, as one tree with exit statuses.

    ClientError
    ├── Failed                1   the server or the network failed
    │   └── Transient             ... and the same request may succeed later
    │       ├── Busy              409, 503 and the like; ``wait`` is the server's Retry-After
    │       │   └── GaveUp            502, 504: it may have been done all the same
    │       ├── Broken            the connection broke, or nothing came for too long
    │       └── Unreachable       no connection could be made
    ├── BadUrl                2   an argument is no URL (click reports all other wrong arguments)
    ├── Refused               3   the server will not do this, however often it is asked
    │   └── Mismatch              ... for the body has not the digest that was sent with it
    ├── Different             4   the bytes are not what they should be
    ├── LocalFailure          5   a local file or program failed
    │   ├── Damaged               ... a qcow2 image is incomplete or inconsistent
    │   ├── InUse                 ... another program has the image open
    │   └── OutputLost            ... stdout cannot be written
    │       └── OutputUnread  141 ... because its reader has gone
    └── Interrupted           130 by Ctrl-C or SIGTERM

``str()`` of each is the sentence that the user reads.
"""

from typing import ClassVar


class ClientError(Exception):
    """Root of all failures; ``status`` is the exit status."""

    status: ClassVar[int] = 1
    is_undone: ClassVar[bool] = False
    """Nothing of what was asked for was done."""


class Failed(ClientError):
    """The server or the network failed."""


class Transient(Failed):
    """The same request may succeed later; ``wait``: seconds that the server asks to wait first."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


class Busy(Transient):
    """The server has no room for this now, or another client holds the image."""

    is_undone = True


class GaveUp(Busy):
    """The server, or a proxy before it, has not waited for the end of what was asked for."""

    is_undone = False


class Broken(Transient):
    """The connection broke, or the answer was cut."""


class Unreachable(Transient):
    """No connection could be made."""

    is_undone = True


class BadUrl(ClientError):
    """An argument is no URL that can be requested."""

    status = 2


class Refused(ClientError):
    """The server refuses, and would again. ``code`` is the HTTP status."""

    status = 3
    is_undone = True

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


class Mismatch(Refused):
    """The server has received other bytes than those of the digest."""

    is_undone = False


class Different(ClientError):
    """Contents differ."""

    status = 4


class LocalFailure(ClientError):
    """A local file or program failed or is missing."""

    status = 5


class Damaged(LocalFailure):
    """A qcow2 image is incomplete or inconsistent, or cannot be checked."""


class InUse(LocalFailure):
    """Another program has the image open, as its lock tells."""


class OutputLost(LocalFailure):
    """The command did its work, but its result cannot be written to stdout."""


class OutputUnread(OutputLost):
    """The reader of stdout has gone; the status is a shell's for a process that SIGPIPE ended."""

    status = 141


class Interrupted(ClientError):
    """The user or the system ended the command."""

    status = 130
