# SPDX-License-Identifier: Apache-2.0
"""Runs clients (``client.py``) in processes of their own, all beginning at the same moment."""

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass

from benchmark.client import Job, Result

#: No single job of a full run takes longer, even on a slow machine.
_LIMIT_SECONDS = 120.0


class ClientFailed(Exception):
    """A client met what it must not; ``str()`` says what."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What several clients did together. Times count from the first connect."""

    results: list[Result]
    began: float

    @property
    def seconds(self) -> float:
        """To the last byte."""
        return max(result.ended for result in self.results) - self.began

    @property
    def first_byte_seconds(self) -> float:
        """To the first byte of any answer."""
        return min(result.first for result in self.results) - self.began

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


def run(jobs: list[Job], status: int = 200) -> Outcome:
    """Run one client per job.

    Raises:
        ClientFailed: one did not finish, or had an answer other than ``status``.
    """
    with ExitStack() as stack:
        starting, go = os.pipe()
        stack.callback(os.close, starting)
        with os.fdopen(go, "wb"):
            clients = [_started(stack, job, starting) for job in jobs]
            for client in clients:
                if client.stdout:
                    client.stdout.readline()
        results = [_result(client) for client in clients]
    for result in results:
        if result.status != status:
            raise ClientFailed(f"answer {result.status} instead of {status}")
    return Outcome(results, min(result.began for result in results))


def _started(stack: ExitStack, job: Job, starting: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmark.client", json.dumps(asdict(job))]
    pipe = subprocess.PIPE
    client = subprocess.Popen(command, stdin=starting, stdout=pipe, stderr=pipe, text=True)
    stack.enter_context(client)
    stack.callback(client.kill)  # which does nothing to one that has ended
    return client


def _result(client: subprocess.Popen[str]) -> Result:
    try:
        out, err = client.communicate(timeout=_LIMIT_SECONDS)
    except subprocess.TimeoutExpired as exc:
        raise ClientFailed(f"a client did not finish in {_LIMIT_SECONDS:g} s") from exc
    if client.returncode:
        raise ClientFailed(err.strip().rpartition("\n")[2])
    return Result(**json.loads(out))
