# SPDX-License-Identifier: Apache-2.0
"""One HTTP client, so cheap that it is not what limits, and the same for every server.

Runs as a process of its own, so that its CPU time is no server's. Each job is a line of JSON on
its standard input: it answers ``ready``, begins at the next line, and prints the result in JSON.
"""

import hashlib
import json
import os
import re
import socket
import ssl
import struct
import sys
import time
from dataclasses import asdict, dataclass

_BUFFER = 1 << 20
_SILENCE_SECONDS = 60  # longer than any server here may think
#: Bodies up to this size are kept, and leave in one call with their head: as oVirt's client
#: sends them, and so that no head waits for an acknowledgement. Others go by sendfile(2).
_KEPT = 4 << 20
_LENGTH = re.compile(rb"(?i)\r\ncontent-length: *([0-9]+)\r\n")


class WrongAnswer(Exception):
    """An answer is not what the job says; ``str()`` says how."""


@dataclass
class Job:
    """Requests to make, one after the other on a fresh connection, and what they answer."""

    port: int
    requests: list[str]
    """Heads, with a small body behind them if they have one; a job goes round them."""
    status: int = 200
    """What each answer must have."""
    size: int = -1
    """How many bytes each answer must bring; -1: any number."""
    count: int = 1
    """How many requests, at least."""
    seconds: float = 0.0
    """For how long there are more."""
    cut_off: float = 0.0
    """After how many seconds the answer is cut off; 0: not before its end."""
    file: str = ""
    """A file whose bytes [offset, offset + length) are the body."""
    offset: int = 0
    length: int = 0
    trust: str = ""
    """The CA of a server that speaks TLS; plain HTTP without."""
    digest: bool = False
    """Hash what is received. Never in a timed run."""


@dataclass
class Result:
    """What happened. Times are of CLOCK_MONOTONIC, which all processes share."""

    received: int = 0
    requests: int = 0
    began: float = 0.0
    sent: float = 0.0
    """When the last byte of the last request had been taken by the socket."""
    first: float = 0.0
    """When the first byte of the answer had arrived."""
    ended: float = 0.0
    digest: str = ""


def head(method: str, path: str, **fields: object) -> str:
    """Return a request's head; ``Content_Length=5`` is a field."""
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in fields.items()]
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: bench", *lines, "", ""])


class Connection:
    """A connection that serves a job."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._body = b""
        if job.file and job.length <= _KEPT and not job.trust:
            with open(job.file, "rb") as file:
                file.seek(job.offset)
                self._body = file.read(job.length)
        self._buffer = bytearray(_BUFFER)
        self._view = memoryview(self._buffer)
        self.found = hashlib.sha256()
        self.first = self.sent = 0.0

    def open(self) -> socket.socket:
        """Connect; whoever does closes what is returned."""
        sock = socket.create_connection(("127.0.0.1", self._job.port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # The kernel's timeouts: Python's cost a poll(2) for each call.
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", _SILENCE_SECONDS, 0))
        if self._job.trust:
            context = ssl.create_default_context(cafile=self._job.trust)
            sock = context.wrap_socket(sock, server_hostname="localhost")
        self._sock = sock
        return sock

    def exchange(self, request: bytes) -> int:
        """Make a request; return how many bytes the body of its answer has.

        Raises:
            WrongAnswer: its status or its length is wrong, or it ends early.
            OSError: the connection broke, or nothing came for a minute.
        """
        self._send(request)
        self.sent = time.monotonic()
        filled = 0
        while (end := self._buffer.find(b"\r\n\r\n", 0, filled)) < 0:
            filled += self._some(self._view[filled:])
        self.first = self.first or time.monotonic()
        if int(self._buffer[9:12]) != self._job.status:
            raise WrongAnswer(bytes(self._view[: min(filled, 1000)]).decode("latin-1"))
        if (length := _LENGTH.search(self._buffer, 0, end + 2)) is None:
            return self._rest(end + 4, filled, None)
        received = self._rest(end + 4, filled, int(length[1]))
        if self._job.size not in {-1, received}:
            raise WrongAnswer(f"{received} bytes instead of {self._job.size}")
        return received

    def _send(self, request: bytes) -> None:
        job = self._job
        if self._body:
            sent = self._sock.sendmsg((request, self._body))
            if (left := len(request) + len(self._body) - sent) > 0:
                self._sock.sendall(memoryview(self._body)[len(self._body) - left :])
            return
        self._sock.sendall(request)
        if not job.file:
            return
        with open(job.file, "rb", buffering=0) as file:
            if not job.trust:
                self._sock.sendfile(file, job.offset, job.length)
                return
            file.seek(job.offset)
            left = job.length
            while left and (count := file.readinto(self._view[:left])):
                self._sock.sendall(self._view[:count])
                left -= count

    def _some(self, view: memoryview) -> int:
        if not (count := self._sock.recv_into(view)):
            raise WrongAnswer("the answer ended early")
        return count

    def _rest(self, start: int, stop: int, length: int | None) -> int:
        """Receive a body that begins in [start, stop) of the buffer; without a length, all."""
        received, job, view = stop - start, self._job, self._view
        if job.digest:
            self.found.update(view[start:stop])
        cut_off = time.monotonic() + job.cut_off if job.cut_off else 0.0
        while length is None or received < length:
            most = _BUFFER if length is None else min(_BUFFER, length - received)
            count = self._sock.recv_into(view, most)
            if job.digest:
                self.found.update(view[:count])
            received += count
            if cut_off and time.monotonic() > cut_off:
                break
            if not count:
                if length is None:
                    break
                raise WrongAnswer(f"the answer ended after {received} bytes of {length}")
        return received


def do(job: Job, connection: Connection) -> Result:
    """Do a job."""
    result = Result()
    requests = [request.encode("ascii") for request in job.requests]
    result.began = time.monotonic()
    deadline = result.began + job.seconds
    with connection.open():
        # One at least: on a busy machine the time can be over before the first.
        while (job.seconds and time.monotonic() < deadline) or result.requests < job.count:
            request = requests[result.requests % len(requests)]
            result.received += connection.exchange(request)
            result.requests += 1
        result.ended = time.monotonic()
    result.first, result.sent = connection.first, connection.sent
    result.digest = connection.found.hexdigest()
    return result


def _say(text: str) -> None:
    os.write(sys.stdout.fileno(), f"{text}\n".encode())


def main() -> None:
    """Do jobs until there are no more."""
    while line := sys.stdin.readline():
        job = Job(**json.loads(line))
        connection = Connection(job)
        _say("ready")
        sys.stdin.readline()
        try:
            said = asdict(do(job, connection))
        except (OSError, ValueError, WrongAnswer) as exc:
            said = {"failed": f"{type(exc).__name__}: {exc}"}
        _say(json.dumps(said))


if __name__ == "__main__":
    main()
