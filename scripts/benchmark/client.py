# SPDX-License-Identifier: Apache-2.0
"""One HTTP client, cheap and the same for every server: raw sockets, one reused buffer.

Runs as a process of its own, so that its CPU time is no server's. Reads a job (one line of
JSON) from standard input, answers ``ready``, begins when a second line arrives, and prints
the result as one line of JSON. Knows nothing of the rest of the benchmark.

    transfer  one request on a fresh connection: connect, head, body (sendfile), answer
    loop      requests one after the other on one connection, for a time or a count
"""

import hashlib
import json
import os
import re
import socket
import ssl
import sys
import time
from dataclasses import asdict, dataclass

BUFFER = 1 << 20
SILENCE_SECONDS = 60.0  # longer than any server here may think


@dataclass
class Job:
    """What to do."""

    kind: str
    port: int
    heads: list[str]
    """Request heads without the final empty line; a loop goes round them."""
    file: str = ""
    """A file whose bytes [offset, offset + length) are the body."""
    offset: int = 0
    length: int = 0
    seconds: float = 0.0
    """When a loop ends; when a transfer is cut off (0: not before its end)."""
    count: int = 0
    """How many requests a loop makes, where ``seconds`` is 0."""
    trust: str = ""
    """The CA of a server that speaks TLS; plain HTTP without."""
    digest: bool = False
    """Hash what is received. Never in a timed run."""


@dataclass
class Result:
    """What happened. Times are of CLOCK_MONOTONIC, which all processes share."""

    status: int = 0
    received: int = 0
    requests: int = 0
    began: float = 0.0
    first: float = 0.0
    """When the first byte of the answer had arrived."""
    ended: float = 0.0
    digest: str = ""


class Client:
    """One connection."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._buffer = memoryview(bytearray(BUFFER))
        self._hash = hashlib.sha256() if job.digest else None
        self._heads = [f"{head}\r\n\r\n".encode("ascii") for head in job.heads]
        self.result = Result()

    def run(self) -> Result:
        """Do the job."""
        result = self.result
        result.began = time.monotonic()
        with self._connect() as sock:
            if self._job.kind == "loop":
                self._loop(sock)
            else:
                self._transfer(sock)
            result.ended = time.monotonic()
        if self._hash:
            result.digest = self._hash.hexdigest()
        return result

    def _transfer(self, sock: socket.socket) -> None:
        sock.sendall(self._heads[0])
        self._send_body(sock)
        cut_off = self.result.began + self._job.seconds if self._job.seconds else float("inf")
        self._answer(sock, cut_off)

    def _connect(self) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self._job.port), SILENCE_SECONDS)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if not self._job.trust:
            return sock
        context = ssl.create_default_context(cafile=self._job.trust)
        return context.wrap_socket(sock, server_hostname="localhost")

    def _send_body(self, sock: socket.socket) -> None:
        if not self._job.file:
            return
        if isinstance(sock, ssl.SSLSocket):
            self._send_copied(sock)
            return
        fd = os.open(self._job.file, os.O_RDONLY)
        offset, stop = self._job.offset, self._job.offset + self._job.length
        sock.settimeout(None)
        while offset < stop:
            offset += os.sendfile(sock.fileno(), fd, offset, stop - offset)
        sock.settimeout(SILENCE_SECONDS)
        os.close(fd)

    def _send_copied(self, sock: ssl.SSLSocket) -> None:
        with open(self._job.file, "rb", buffering=0) as file:
            file.seek(self._job.offset)
            left = self._job.length
            while left:
                count = file.readinto(self._buffer[:left])
                sock.sendall(self._buffer[:count])
                left -= count

    def _loop(self, sock: socket.socket) -> None:
        heads, job, result = self._heads, self._job, self.result
        deadline = result.began + job.seconds
        while time.monotonic() < deadline if job.seconds else result.requests < job.count:
            sock.sendall(heads[result.requests % len(heads)])
            self._answer(sock, float("inf"))
            result.requests += 1

    def _answer(self, sock: socket.socket, cut_off: float) -> None:
        """Receive one answer; without a Content-Length, up to the connection's end."""
        buffer, result = self._buffer, self.result
        filled = end = 0
        while not end:
            count = sock.recv_into(buffer[filled:])
            if not count:
                raise ConnectionError("the server closed the connection in the head")
            result.first = result.first or time.monotonic()
            filled += count
            end = bytes(buffer[:filled]).find(b"\r\n\r\n") + 4
            end = 0 if end < 4 else end  # noqa: PLR2004 - find returned -1
        head = bytes(buffer[:end])
        result.status = int(head[9:12])
        length = re.search(rb"(?i)\r\nContent-Length: ([0-9]+)", head)
        left = int(length[1]) if length else 1 << 62
        left -= self._take(buffer[end:filled])
        while left:
            count = sock.recv_into(buffer, min(left, BUFFER))
            if not count:
                break
            left -= self._take(buffer[:count])
            if time.monotonic() > cut_off:
                return
        if left and length:
            raise ConnectionError(f"the answer is {left} bytes too short")

    def _take(self, piece: memoryview) -> int:
        self.result.received += len(piece)
        if self._hash:
            self._hash.update(piece)
        return len(piece)


def main() -> None:
    """Read the job, wait for the word, do it, print the result."""
    client = Client(Job(**json.loads(sys.stdin.readline())))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    sys.stdout.write(json.dumps(asdict(client.run())) + "\n")


if __name__ == "__main__":
    main()
