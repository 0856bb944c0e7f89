# SPDX-License-Identifier: Apache-2.0
"""A file that is a disk, and what can be done with it."""

import random
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from imageserver.backends.file.kind import FileImage
from imageserver.backends.file.raw import RawFile, RawFiles
from imageserver.core.ports import Intent
from tests.unit.fakes import Bytes

#: What file systems usually allocate.
BLOCK = 4096
SIZE = 20 * BLOCK + 512
OLD = random.Random(3).randbytes(SIZE)  # noqa: S311 - no secret

CHANGES: dict[str, Callable[[RawFile], object]] = {
    "short write": lambda opened: list(opened.write(SIZE - 10, 10, Bytes(b"x" * 10))),
    "long write": lambda opened: list(opened.write(0, SIZE, Bytes(OLD, BLOCK))),
    "replacement": lambda opened: list(opened.replace(SIZE, Bytes(OLD, BLOCK))),
    "zeroing": lambda opened: list(opened.zero(0, SIZE)),
}


def open_raw(disk: Path, intent: Intent = Intent.WRITE, *, sparse: bool = True) -> closing[RawFile]:
    image = FileImage(str(disk), raw=True, sparse=sparse)
    return closing(RawFiles(BLOCK).open(image, intent))
