# SPDX-License-Identifier: Apache-2.0
"""Long reads, started one by one, and which worker has which: read from the slot table."""

import contextlib
import selectors
import socket
import threading
import time
from collections import Counter
from typing import Self

from lab.processes import LabFailed, wait_until
from lab.servers import slots

from benchmark.world import ImageServer
from imageserver.core.slots import Kind

_APART_SECONDS = 0.1
_WAIT_SECONDS = 10.0
_TRIES = 40


class Readers:
    """Clients that read at full speed, all on one thread, until the ``with`` block ends."""

    def __init__(self, server: ImageServer, path: str) -> None:
        self._address = ("127.0.0.1", server.port)
        self._head = f"GET {path} HTTP/1.1\r\nHost: bench\r\n\r\n".encode()
        self._workers = server.worker_pids()
        self._table = slots(server.runtime)
        self._selector = selectors.DefaultSelector()
        self._stopping = False
        self._thread = threading.Thread(target=self._drain, daemon=True)
        self._socks: list[socket.socket] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stopping = True
        self._thread.join()
        for sock in list(self._socks):
            self._close(sock)
        try:
            self._wait_for(0)
        finally:
            self._selector.close()
            self._table.close()

    def add(self, count: int, first: list[int]) -> list[int]:
        """Start ``count`` readers; return what each worker has then, workers ``first`` first."""
        wanted = len(self._socks) + count
        for _ in range(count):
            self._start()
            time.sleep(_APART_SECONDS)
        self._wait_for(wanted)
        counts = self._counts()
        order = first + [pid for pid in self._workers if pid not in first]
        return [counts[pid] for pid in order]

    def hold(self, workers: int, each: int) -> list[int]:
        """Let ``workers`` workers have ``each`` readers and the others none; return their pids."""
        owned: dict[int, list[socket.socket]] = {pid: [] for pid in self._workers}
        for _ in range(_TRIES):
            full = [pid for pid, socks in owned.items() if len(socks) >= each][:workers]
            if len(full) == workers:
                for pid, socks in owned.items():
                    for sock in socks[each if pid in full else 0 :]:
                        self._close(sock)
                self._wait_for(workers * each)
                return full
            before = self._counts()
            sock = self._start()
            self._wait_for(len(self._socks))
            (pid,) = self._counts() - before
            owned[pid].append(sock)
        raise LabFailed(f"{_TRIES} reads did not give {each} to each of {workers} workers")

    def _counts(self) -> Counter[int]:
        return Counter(holder.owner.pid for holder in self._table.holders(Kind.READ))

    def _wait_for(self, count: int) -> None:
        wait_until(lambda: self._counts().total() == count, _WAIT_SECONDS)

    def _start(self) -> socket.socket:
        sock = socket.create_connection(self._address, _WAIT_SECONDS)
        sock.sendall(self._head)
        self._socks.append(sock)
        self._selector.register(sock, selectors.EVENT_READ)
        return sock

    def _close(self, sock: socket.socket) -> None:
        self._selector.unregister(sock)
        self._socks.remove(sock)
        sock.close()

    def _drain(self) -> None:
        buffer = bytearray(1 << 20)
        while not self._stopping:
            for key, _ in self._selector.select(0.05):
                # Closed meanwhile by the other thread.
                with contextlib.suppress(OSError, ValueError):
                    sock = key.fileobj
                    if isinstance(sock, socket.socket):
                        sock.recv_into(buffer, 256 * 1024)
