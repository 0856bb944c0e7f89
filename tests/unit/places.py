# SPDX-License-Identifier: Apache-2.0
"""A config directory on disk, with a clock and a sense of first times of our own."""

import os
from pathlib import Path

import pytest

from imageserver.backends.file.kind import FileImage
from imageserver.core.errors import UnknownImage
from imageserver.transfers.files import TransferFiles
from tests.unit.logged import told

SECOND = 1_000_000_000
NOW = 1_700_000_000 * SECOND
OLD = NOW - 60 * SECOND
ME = os.geteuid()
A, B = '{"backend":"file","file":"/images/a"}', '{"backend":"file","file":"/images/b"}'


class Place:
    """A config directory with its registry, whose clock stands at ``NOW``."""

    def __init__(self, path: Path, log: pytest.LogCaptureFixture) -> None:
        self.path = path
        self.now = NOW
        self.said: set[str] = set()
        self.registry = self.another()
        self._log = log

    def another(self, owners: tuple[int, ...] = (ME,)) -> TransferFiles:
        """Return another worker's registry."""
        return TransferFiles(str(self.path), owners, self._is_first, lambda: self.now)

    def _is_first(self, text: str) -> bool:
        is_first = text not in self.said
        self.said.add(text)
        return is_first

    def put(self, name: str, text: str | bytes, mtime_ns: int = OLD) -> Path:
        """Write a transfer file in place, keeping its inode."""
        file = self.path / name
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        os.utime(file, ns=(mtime_ns, mtime_ns))
        return file

    def image(self, name: str = "t") -> str | None:
        """Return the path that a transfer names; None where it is unknown."""
        try:
            found = self.registry.get(name)
        except UnknownImage:
            return None
        assert isinstance(found.image, FileImage)
        return found.image.path

    def reports(self) -> list[str]:
        """Return the problems that were logged."""
        return [str(told(record)[1]["problem"]) for record in self._log.records]
