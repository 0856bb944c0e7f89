# SPDX-License-Identifier: Apache-2.0
"""What the system says of a file, as one of our errors."""

import errno

from imageserver.core.errors import (
    NO_DESCRIPTOR,
    Exhausted,
    FileAccessError,
    ImageServerError,
    NoSpace,
)
from imageserver.core.transfer import path_text

_NO_SPACE = frozenset((errno.ENOSPC, errno.EDQUOT))


def failure(path: bytes, exc: OSError) -> ImageServerError:
    """Return the error that stands for ``exc``, which names the file."""
    cls: type[ImageServerError] = NoSpace if exc.errno in _NO_SPACE else FileAccessError
    if exc.errno in NO_DESCRIPTOR:
        cls = Exhausted
    return cls(f"{path_text(path)}: {exc.strerror}")
