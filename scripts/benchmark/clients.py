# SPDX-License-Identifier: Apache-2.0
"""Runs clients (``client.py``) in processes of their own, all beginning at the same moment."""

import json
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from client import Job, Result

_CLIENT = Path(__file__).with_name("client.py")
#: No single job of a full run takes longer, even on a slow machine.
_LIMIT_SECONDS = 120.0


class ClientFailed(Exception):
    """A client met what it must not; ``str()`` says what."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What several clients did together."""

    results: list[Result]

    @property
    def seconds(self) -> float:
        """From the first connect to the last byte."""
        began = min(result.began for result in self.results)
        return max(result.ended for result in self.results) - began

    @property
    def first_byte_seconds(self) -> float:
        """From the first connect to the first byte of any answer."""
        began = min(result.began for result in self.results)
        return min(result.first for result in self.results) - began

    @property
    def requests_per_second(self) -> float:
        """Of all clients together."""
        return sum(result.requests for result in self.results) / self.seconds

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
        running = [stack.enter_context(_started(job)) for job in jobs]
        try:
            for client in running:
                _readline(client)
            for client in running:
                _tell(client, "go")
            results = [_result(client) for client in running]
        finally:
            for client in running:
                if client.poll() is None:
                    client.kill()
    for result in results:
        if result.status != status:
            raise ClientFailed(f"answer {result.status} instead of {status}")
    return Outcome(results)


def _started(job: Job) -> subprocess.Popen[str]:
    client = subprocess.Popen(  # noqa: S603 - our own script
        [sys.executable, str(_CLIENT)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    _tell(client, json.dumps(asdict(job)))
    return client


def _tell(client: subprocess.Popen[str], line: str) -> None:
    if client.stdin is None:
        raise AssertionError
    client.stdin.write(line + "\n")
    client.stdin.flush()


def _readline(client: subprocess.Popen[str]) -> str:
    if client.stdout is None:
        raise AssertionError
    return client.stdout.readline()


def _result(client: subprocess.Popen[str]) -> Result:
    try:
        out, err = client.communicate(timeout=_LIMIT_SECONDS)
    except subprocess.TimeoutExpired as exc:
        raise ClientFailed(f"a client did not finish in {_LIMIT_SECONDS:g} s") from exc
    if client.returncode:
        raise ClientFailed(err.strip().rpartition("\n")[2])
    return Result(**json.loads(out))
