# SPDX-License-Identifier: Apache-2.0
"""Every way imagectl can fail, as one tree; ``str()`` is the one sentence that a user is told.

    ClientError
    ├── Failed                 the server or the network did not do it            1
    │   ├── Transient          ... but may do it if asked again
    │   │   ├── Busy           409, 503 and their like; carries Retry-After
    │   │   ├── Broken         the connection broke, or nothing came for too long
    │   │   └── Unreachable    there was no connection at all
    ├── Refused                the server will not do this, however often asked   3
    ├── Different              the bytes are not what they should be              4
    ├── LocalFailure           a file or a program on this side                   5
    │   └── Damaged            ... a qcow2 image that is not whole
    └── Interrupted            by Ctrl-C or SIGTERM                               130

2 is click's, for arguments that are wrong.
"""

from typing import ClassVar


class ClientError(Exception):
    """Root of all failures; ``status`` is the exit status."""

    status: ClassVar[int] = 1


class Failed(ClientError):
    """The server or the network failed."""


class Transient(Failed):
    """What failed may succeed when asked again; ``wait`` is how long the server says to wait."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


class Busy(Transient):
    """The server has no room for this now, or another holds the image."""


class Broken(Transient):
    """The connection broke, or the answer was cut."""


class Unreachable(Transient):
    """There was no connection at all."""


class Refused(ClientError):
    """The server refuses: asking again would not help. ``code`` is the HTTP status."""

    status = 3

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


class Different(ClientError):
    """Contents differ."""

    status = 4


class LocalFailure(ClientError):
    """A local file or program failed or is missing."""

    status = 5


class Damaged(LocalFailure):
    """An image is not whole, or not known to be."""


class Interrupted(ClientError):
    """The user, or the system, ended it."""

    status = 130
