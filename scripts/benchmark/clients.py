# SPDX-License-Identifier: Apache-2.0
"""Runs clients (``client.py``) in processes of their own, all beginning at the same moment."""

import contextlib
import json
import select
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any

from benchmark.client import Job, Result

#: No single job of a full run takes longer, even on a slow machine.
_LIMIT_SECONDS = 120.0


class ClientFailed(Exception):
    """A client met what it must not; ``str()`` says what."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What several clients did together. Times count from the first connect."""

    results: list[Result]

    @property
    def began(self) -> float:
        """When the first began."""
        return min(result.began for result in self.results)

    @property
    def seconds(self) -> float:
        """To the last byte."""
        return max(result.ended for result in self.results) - self.began

    @property
    def first_byte_seconds(self) -> float:
        """To the first byte of any answer."""
        return min(result.first for result in self.results) - self.began

    @property
    def waited(self) -> float:
        """From the last byte of the last request to the end of its answer."""
        return max(result.ended - result.sent for result in self.results)

    @property
    def requests(self) -> int:
        """Of all clients together."""
        return sum(result.requests for result in self.results)

    @property
    def requests_per_second(self) -> float:
        """Of all clients together."""
        return self.requests / self.seconds

    @property
    def digests(self) -> list[str]:
        """What each received."""
        return [result.digest for result in self.results]

    @property
    def received(self) -> int:
        """Bytes of bodies."""
        return sum(result.received for result in self.results)


class Clients:
    """Client processes: started when they are first needed, then kept; ``close`` ends them."""

    def __init__(self) -> None:
        self._running: list[subprocess.Popen[bytes]] = []

    def run(self, jobs: list[Job]) -> Outcome:
        """Run one client per job.

        Raises:
            ClientFailed: one did not finish, made no request, or had an answer that its job
                does not allow.
        """
        while len(self._running) < len(jobs):
            command = [sys.executable, "-m", "benchmark.client"]
            pipe = subprocess.PIPE
            self._running.append(subprocess.Popen(command, stdin=pipe, stdout=pipe))
        chosen = self._running[: len(jobs)]
        try:
            for client, job in zip(chosen, jobs, strict=True):
                _tell(client, json.dumps(asdict(job)))
            for client in chosen:
                _heard(client)
            for client in chosen:
                _tell(client, "go")
            return Outcome([_result(json.loads(_heard(client))) for client in chosen])
        except BaseException:
            self.close()  # the others may still be at it
            raise

    def close(self) -> None:
        """End them all; the next run starts others."""
        for client in self._running:
            client.kill()
            with contextlib.suppress(BrokenPipeError), client:
                pass
        self._running.clear()


def _tell(client: subprocess.Popen[bytes], line: str) -> None:
    # One that has ended is noticed when it does not answer.
    with contextlib.suppress(BrokenPipeError):
        if client.stdin:
            client.stdin.write(f"{line}\n".encode())
            client.stdin.flush()


def _heard(client: subprocess.Popen[bytes]) -> bytes:
    if not client.stdout or not select.select([client.stdout], [], [], _LIMIT_SECONDS)[0]:
        raise ClientFailed(f"a client did not finish in {_LIMIT_SECONDS:g} s")
    if not (line := client.stdout.readline()):
        raise ClientFailed("a client has ended")
    return line


def _result(said: dict[str, Any]) -> Result:
    if failed := said.get("failed"):
        raise ClientFailed(failed)
    result = Result(**said)
    if not result.requests:
        raise ClientFailed("a client made no request")
    return result
