# SPDX-License-Identifier: Apache-2.0
"""One HTTP client, cheap and the same for every server: ``lab.wire`` with a buffer of 1 MiB.

Runs as a process of its own, so that its CPU time is no server's. Its argument is a job in JSON;
it answers ``ready``, begins when its standard input ends, and prints the result in JSON.
"""

import hashlib
import json
import ssl
import sys
import time
from dataclasses import asdict, dataclass

from lab.wire import Wire

_BUFFER = 1 << 20
_SILENCE_SECONDS = 60.0  # longer than any server here may think


@dataclass
class Job:
    """Requests to make, one after the other on a fresh connection."""

    port: int
    heads: list[str]
    """Request heads without the final empty line; a job goes round them."""
    count: int = 1
    """How many requests, where ``seconds`` is 0."""
    seconds: float = 0.0
    """For how long there are more requests."""
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

    status: int = 0
    received: int = 0
    requests: int = 0
    began: float = 0.0
    first: float = 0.0
    """When the first byte of the answer had arrived."""
    ended: float = 0.0
    digest: str = ""


def do(job: Job) -> Result:
    """Do a job."""
    result, found = Result(), hashlib.sha256()
    heads = [f"{head}\r\n\r\n".encode("ascii") for head in job.heads]
    context = ssl.create_default_context(cafile=job.trust) if job.trust else None
    result.began = time.monotonic()
    deadline = result.began + job.seconds
    cut_off = result.began + job.cut_off if job.cut_off else float("inf")
    with Wire(job.port, _SILENCE_SECONDS, context, name="localhost", buffer=_BUFFER) as wire:
        while time.monotonic() < deadline if job.seconds else result.requests < job.count:
            wire.send(heads[result.requests % len(heads)])
            if job.file:
                wire.send_file(job.file, job.offset, job.length)
            wire.wait()
            result.first = result.first or time.monotonic()
            head = wire.head()
            result.status = head.status
            for piece in wire.pieces(head):
                result.received += len(piece)
                if job.digest:
                    found.update(piece)
                if time.monotonic() > cut_off:
                    break
            result.requests += 1
        result.ended = time.monotonic()
    result.digest = found.hexdigest()
    return result


if __name__ == "__main__":
    job = Job(**json.loads(sys.argv[1]))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.read()
    sys.stdout.write(json.dumps(asdict(do(job))) + "\n")
