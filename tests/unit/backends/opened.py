# SPDX-License-Identifier: Apache-2.0
"""What opens exports of servers that are there, and what can be done with one."""

from collections.abc import Callable

from imageserver.backends.nbd.connection import Tuning
from imageserver.backends.nbd.exports import NbdExports
from imageserver.backends.nbd.pool import Pool
from imageserver.core.ports import Backend
from tests.unit.fakes import Bytes

KIB = 1024
WHOLE = 1 << 20
SLOW: dict[str, Callable[[Backend], object]] = {
    "read": lambda backend: list(backend.read(0, 10)),
    "long read": lambda backend: list(backend.read(0, WHOLE)),
    "write": lambda backend: list(backend.write(0, 10, Bytes(b"x" * 10))),
    "long write": lambda backend: list(backend.write(0, WHOLE, Bytes(bytes(WHOLE), WHOLE))),
    "replace": lambda backend: list(backend.replace(WHOLE, Bytes(bytes(WHOLE), WHOLE))),
    "zero": lambda backend: list(backend.zero(0, WHOLE)),
    "flush": lambda backend: backend.flush(),
    "extents": lambda backend: list(backend.extents(0, WHOLE, dirty=False)),
}


class Held:
    """A transfer that never ends: ``holds.Hold`` and ``holds.Holds``."""

    def hold(self, _transfer: object) -> "Held":
        return self

    def turned_away(self, _server: object) -> None:
        pass

    def without_room(self, _servers: object) -> set[tuple[int, ...]]:
        return set()

    def is_current(self) -> bool:
        return True

    def close(self) -> None:
        pass


def exports_of(idle_seconds: float = 0.0) -> NbdExports:
    """Return what opens exports, and keeps connections for so long."""
    tuning = Tuning(chunk_size=64 * KIB, queue_depth=3, timeout=5.0)
    return NbdExports(tuning, Pool(idle_seconds, Held()))
