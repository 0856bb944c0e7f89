# SPDX-License-Identifier: Apache-2.0
"""An NBD server that says what a test wants: newstyle with structured replies, one thread a client.

For what no real server can be made to say: sizes beyond 2^63, block status without sense.
"""

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

_OPTION_REPLY, _SIMPLE_REPLY, _CHUNK = 0x3E889045565A9, 0x67446698, 0x668E33EF
_GO, _STRUCTURED, _SET_CONTEXT = 7, 8, 10
_ACK, _INFO, _CONTEXT, _UNSUPPORTED = 1, 3, 4, 0x80000001
READ, WRITE, DISCONNECT, FLUSH, ZERO, STATUS = 0, 1, 2, 3, 6, 7
HAS_FLAGS, CAN_FLUSH, CAN_ZERO, MULTI_CONN = 1, 4, 64, 256


@dataclass
class Liar:
    """What the server says, and the commands that it got: (connection, command, offset, length)."""

    path: Path
    size: int = 1 << 20
    flags: int = HAS_FLAGS | CAN_FLUSH | CAN_ZERO
    blocks: tuple[int, int, int] | None = None
    #: The lengths and flags of block status, from offset and length.
    status: Callable[[int, int], list[tuple[int, int]]] = lambda _offset, length: [(length, 0)]
    #: Called before each command is answered, with its type.
    before: Callable[[int], object] = lambda _command: None
    got: list[tuple[int, int, int, int]] = field(default_factory=list)
    #: The meta contexts that the last client has asked for; it gets all but ``lacking``.
    contexts: list[bytes] = field(default_factory=list)
    lacking: tuple[bytes, ...] = (b"qemu:allocation-depth",)

    def serve(self, client: socket.socket, number: int) -> None:
        with contextlib.suppress(OSError, struct.error), client, client.makefile("rwb") as stream:
            self._serve(Peer(stream), number)  # type: ignore[arg-type]

    def _serve(self, peer: "Peer", number: int) -> None:
        peer.send(b"NBDMAGICIHAVEOPT", struct.pack(">H", 3))
        peer.take(">I")
        self._negotiate(peer)
        while True:
            _, _, command, handle, offset, length = peer.take(">IHHQQI")
            if command == WRITE:
                peer.stream.read(length)
            self.got.append((number, command, offset, length))
            if command == DISCONNECT:
                return
            self.before(command)
            self.answer(peer, command, handle, offset, length)

    def _negotiate(self, peer: "Peer") -> None:
        while True:
            _, option, length = peer.take(">QII")
            data = peer.stream.read(length)
            if option == _SET_CONTEXT:
                at = 8 + struct.unpack_from(">I", data)[0]
                self.contexts.clear()
                while at < length:
                    (size,) = struct.unpack_from(">I", data, at)
                    self.contexts.append(data[at + 4 : at + 4 + size])
                    at += 4 + size
                for index, name in enumerate(self.granted):
                    peer.reply(option, _CONTEXT, struct.pack(">I", index) + name)
            elif option == _GO:
                peer.reply(option, _INFO, struct.pack(">HQH", 0, self.size, self.flags))
                if self.blocks:
                    peer.reply(option, _INFO, struct.pack(">HIII", 3, *self.blocks))
            known = option in {_GO, _STRUCTURED, _SET_CONTEXT}
            peer.reply(option, _ACK if known else _UNSUPPORTED)
            if option == _GO:
                return

    @property
    def granted(self) -> list[bytes]:
        return [name for name in self.contexts if name not in self.lacking]

    def answer(self, peer: "Peer", command: int, handle: int, offset: int, length: int) -> None:
        if command == READ:
            data = struct.pack(">Q", offset) + b"D" * length
            peer.send(struct.pack(">IHHQI", _CHUNK, 1, 1, handle, len(data)), data)
        elif command == STATUS:
            for index in range(len(self.granted)):
                pairs = self.status(offset, length)
                data = struct.pack(">I", index) + b"".join(struct.pack(">II", *p) for p in pairs)
                last = index == len(self.granted) - 1
                peer.send(struct.pack(">IHHQI", _CHUNK, last, 5, handle, len(data)), data)
        else:
            peer.send(struct.pack(">IIQ", _SIMPLE_REPLY, 0, handle))


class Peer:
    """The client's side of a connection."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream

    def take(self, layout: str) -> tuple[int, ...]:
        return struct.unpack(layout, self.stream.read(struct.calcsize(layout)))

    def send(self, *pieces: bytes) -> None:
        self.stream.write(b"".join(pieces))
        self.stream.flush()

    def reply(self, option: int, kind: int, data: bytes = b"") -> None:
        self.send(struct.pack(">QIII", _OPTION_REPLY, option, kind, len(data)), data)


@contextlib.contextmanager
def lying(liar: Liar) -> Iterator[Liar]:
    """Serve until the block ends; every client must have gone by then."""
    threads = []

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                number = len(threads)
                serving = threading.Thread(
                    target=liar.serve, args=(client, number), name=f"client {number}"
                )
                threads.append(serving)
                threads[-1].start()

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(liar.path))
        listener.listen()
        acceptor = threading.Thread(target=accept)
        acceptor.start()
        try:
            yield liar
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            acceptor.join()
            for thread in threads:
                thread.join(10)
