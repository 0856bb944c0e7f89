# SPDX-License-Identifier: Apache-2.0
"""A pool of connections over fake handles, transfers that end, and a clock that is set."""

import socket
import threading
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import nbd

from imageserver.backends.nbd.connection import Connection, Tuning
from imageserver.backends.nbd.kind import NbdImage
from imageserver.backends.nbd.pool import LOOK_SECONDS, Kept, Pool
from imageserver.core.transfer import Transfer

IDLE = 1.0
ALLOCATION, DIRTY = "base:allocation", "qemu:dirty-bitmap:b"


@dataclass
class Handle:
    """What libnbd's handle is asked here."""

    multi_conn: bool = True
    hung_up: bool = False
    has_said_goodbye: bool = False

    def get_size(self) -> int:
        return 1 << 20

    def get_block_size(self, _which: int) -> int:
        return 0

    def can_multi_conn(self) -> bool:
        return self.multi_conn

    def poll(self, _milliseconds: int) -> int:
        if self.hung_up:
            raise nbd.Error("hung up", 0)
        return 0

    def aio_disconnect(self) -> None:
        self.has_said_goodbye = True

    def aio_is_closed(self) -> bool:
        return True


@dataclass
class Hold:
    world: "World"
    transfer: Transfer
    closed: bool = False

    def is_current(self) -> bool:
        return self.world.transfers.get(self.transfer.id) == self.transfer.image

    def close(self) -> None:
        self.closed = True


@dataclass
class World:
    """Transfers, a clock, a pool, and the sockets that clients wait at."""

    path: Path
    seconds: float = 1000.0
    idle_seconds: float = IDLE
    transfers: dict[str, NbdImage] = field(default_factory=dict)
    holds: list[Hold] = field(default_factory=list)
    crowded: set[tuple[int, ...]] = field(default_factory=set)
    told: list[tuple[int, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pool = Pool(
            self.idle_seconds,
            self,
            now=self.monotonic,
            waited_for=lambda servers: self.crowded & set(servers),
        )
        self.pool._looking = threading.Thread()  # never started: tests look
        self.image = self.bind("s")
        self.transfers["x"] = self.image

    def monotonic(self) -> float:
        return self.seconds

    def bind(self, name: str, export: str = "") -> NbdImage:
        """Make a server's socket."""
        (self.path / name).unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(self.path / name))
        return NbdImage(str(self.path / name), export)

    def hold(self, transfer: Transfer) -> Hold | None:
        if self.transfers.get(transfer.id) != transfer.image:
            return None
        self.holds.append(Hold(self, transfer))
        return self.holds[-1]

    def turned_away(self, server: tuple[int, ...]) -> None:
        self.told.append(server)

    def without_room(self, servers: Collection[tuple[int, ...]]) -> set[tuple[int, ...]]:
        return set(self.told) & set(servers)

    def connected(
        self,
        transfer: str = "x",
        image: NbdImage | None = None,
        contexts: tuple[str, ...] = (ALLOCATION,),
        **parts: bool,
    ) -> Kept:
        """Return a connection that is in use."""
        image = image or self.image
        tuning = Tuning(4096, 3, 5.0)
        made = Connection(Handle(**parts), "export", image.stamp() or (), tuning, contexts)
        return Kept(made, image, Transfer(transfer, image))

    def given(self, transfer: str = "x", image: NbdImage | None = None) -> Kept:
        """Return a connection that was given to the pool."""
        kept = self.connected(transfer, image)
        self.pool.give(kept)
        return kept

    def take(
        self,
        image: NbdImage | None = None,
        *contexts: str,
        transfer: str = "x",
        changed_ns: int = 0,
    ) -> Kept | None:
        image = image or self.image
        asking = Transfer(transfer, image, changed_ns=changed_ns)
        return self.pool.take(image.stamp() or (), image, contexts, asking)

    def pass_by(self, seconds: float) -> None:
        """Let time pass, with a look twenty times a second."""
        until = self.seconds + seconds
        while self.seconds < until:
            self.seconds = min(until, self.seconds + LOOK_SECONDS)
            self.pool.look()


def is_closed(kept: Kept) -> bool:
    """Tell whether the connection is, and its hold."""
    return "handle" not in kept.connection.__dict__ and kept.hold is None
