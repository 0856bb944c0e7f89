# SPDX-License-Identifier: Apache-2.0
"""Every way a request can fail, as one tree; a leaf carries its facts, never an HTTP status.

    ImageServerError
    ├── BadRequest               the request itself is wrong; ``message`` says how
    │   └── UnsupportedMediaType a PATCH that is neither JSON nor a range write
    ├── NotFound                 no such route
    ├── UnknownImage             no transfer has this id
    ├── Unauthorized             the request does not show the transfer's token
    ├── MethodNotAllowed         the image lacks the method; carries those it has
    ├── PreconditionFailed       the image is in a state that the request excludes
    ├── RangeOutsideImage        the range holds no byte of the image; carries its size
    ├── ImageBusy                another operation holds the image's lock
    ├── NoSlot                   every slot of this kind is taken
    │   └── NoImageSlot          ... that one image may have; other images may find one
    ├── StateUnavailable         the server's own files (locks, slots, usage) cannot be used now
    │   ├── StateFull            ... for their file system is full
    │   └── Exhausted            ... for there is no descriptor or thread left
    ├── BackendError             the NBD server failed or cannot be reached
    │   ├── BackendTimeout       ... or said nothing for too long
    │   └── ImageChanged         the image is not what it was when the request began
    ├── FileAccessError          the image file cannot be opened, sized or replaced
    ├── NoSpace                  the disk is full
    ├── ShortBody                the client ended its body early
    ├── DigestMismatch           the body is complete, and not what its digest says
    └── ClientGone               the client vanished or fell silent: nobody is left to answer

``web/error_answers.py`` holds the one table from these to answers. ``str(error)`` of the four
back-end errors and of the server's own state is for the log; clients see the table's text only.
"""

import errno

from imageserver.core.slots import Kind

#: What the system says where there are no more file descriptors.
NO_DESCRIPTOR = frozenset((errno.EMFILE, errno.ENFILE))


class ImageServerError(Exception):
    """Root of all failures that have an answer of their own."""


class BadRequest(ImageServerError):
    """The request is malformed; ``message`` is what the client is told."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class UnsupportedMediaType(BadRequest):
    """The body's media type does not fit the method."""


class NotFound(ImageServerError):
    """No such route."""


class UnknownImage(ImageServerError):
    """No transfer has this id, or its file is unusable."""


class Unauthorized(ImageServerError):
    """The transfer has a token, and the request does not show it (RFC 9110 section 15.5.2)."""


class MethodNotAllowed(ImageServerError):
    """The image lacks this method; ``allowed`` are those it has."""

    def __init__(self, allowed: tuple[str, ...]) -> None:
        super().__init__(", ".join(allowed))
        self.allowed = allowed


class PreconditionFailed(ImageServerError):
    """The request depends on another state of the image (RFC 9110 section 15.5.13)."""


class RangeOutsideImage(ImageServerError):
    """No byte of the range lies in an image of ``size`` bytes (RFC 9110 section 15.5.17)."""

    def __init__(self, size: int) -> None:
        super().__init__(f"range outside an image of {size} bytes")
        self.size = size


class ImageBusy(ImageServerError):
    """Another operation holds the image's lock."""


class NoSlot(ImageServerError):
    """All slots of ``kind`` are taken."""

    _whose = ""

    def __init__(self, kind: Kind) -> None:
        super().__init__(f"no free {kind.name.lower()} slot{self._whose}")
        self.kind = kind


class NoImageSlot(NoSlot):
    """The image has as many slots of ``kind`` as one image may have."""

    _whose = " of this image"


class StateUnavailable(ImageServerError):
    """The server's own files cannot be used now; ``str()`` is a sentence.

    The runtime directory, a descriptor or a kernel lock: the host's state, not the image's.
    """


class StateFull(StateUnavailable):
    """The file system of the runtime directory is full, or a quota there."""


class Exhausted(StateUnavailable):
    """This process has no descriptor left (``NO_DESCRIPTOR``), or can start no other thread."""


class BackendError(ImageServerError):
    """The NBD server failed, refused, or cannot be reached."""


class BackendTimeout(BackendError):
    """The NBD server completed nothing within its time."""


class ImageChanged(BackendError):
    """Somebody else has written to the image while it was read."""


class FileAccessError(ImageServerError):
    """The image file cannot be opened, sized, or replaced."""


class NoSpace(ImageServerError):
    """The disk under the image is full."""


class ShortBody(ImageServerError):
    """The body ended ``received`` bytes after it began, before its announced length."""

    def __init__(self, received: int) -> None:
        super().__init__(f"body ended after {received} bytes")
        self.received = received


class DigestMismatch(ImageServerError):
    """The body is not what its ``header`` says; ``written`` bytes of it are in the image."""

    def __init__(self, header: str, written: int) -> None:
        super().__init__(f"body does not match its {header}")
        self.header = header
        self.written = written


class ClientGone(ImageServerError):
    """The connection broke, or no byte moved for the client timeout: there is nobody to answer."""
