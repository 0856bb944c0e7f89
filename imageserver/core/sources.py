# SPDX-License-Identifier: Apache-2.0
"""Protocols of where the bytes of a write come from."""

from typing import Protocol


class HasFileno(Protocol):
    """Something poll(2) can wait for."""

    def fileno(self) -> int:
        """Return its file descriptor."""
        ...


class Source(Protocol):
    """Where the bytes of a write come from."""

    def readinto(self, buffer: memoryview, until: HasFileno | None = None) -> int:
        """Fill as much of ``buffer`` as has arrived, waiting for at least one byte.

        Returns 0 only where the body has ended (or ``buffer`` is empty), or once ``until`` is
        readable, which the image's side makes it when it fails.

        Raises:
            ClientGone: the connection broke or fell silent.
        """
        ...


class Body(Source, Protocol):
    """A client's body."""

    def verify(self, written: int = 0) -> None:
        """Compare what was read, all of it, with what the client said that it sends.

        ``written``: how many of the bytes are in the image. A back end that replaces an image as
        a whole asks before it does; what writes in place need not.

        Raises:
            DigestMismatch: it is something else.
        """
        ...
