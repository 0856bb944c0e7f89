# SPDX-License-Identifier: Apache-2.0
"""The Nth call fails: for N = 1, 2, 3 ... until an operation passes without reaching it.

After each: the answer is an error or the right one, an image is the old one or the new one, no
descriptor and no file is left behind, no lock and no slot is held, and the next request succeeds.
"""

import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from lab.faults import Faults

from proving.operations import OPERATIONS
from proving.sweep import Fault, sweep
from proving.world import World

ERRORS = (errno.EIO, errno.ENOSPC, errno.EINTR, errno.ENOMEM, errno.EMFILE)


@contextmanager
def _with_image() -> Iterator[World]:
    with World() as world:
        world.add("image", backend="file", file=str(world.images / "image"))
        world.add("raw", backend="file", file=str(world.images / "raw"), format="raw")
        yield world


def run(errors: Iterable[int] = ERRORS, names: Iterable[str] = ()) -> Iterator[Fault]:
    """Sweep all operations, or those of these names."""
    for operation in OPERATIONS:
        if not names or operation.name in names:
            for error in errors:
                yield from sweep(operation, error, Faults(), _with_image)
