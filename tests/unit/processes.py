# SPDX-License-Identifier: Apache-2.0
"""Other processes: they hold something, or use a slot table with a ``TICKET`` of theirs."""

import contextlib
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from imageserver.core.ports import Ticket
from imageserver.core.slots import Kind
from imageserver.runtime.private import open_private

TICKET = Ticket("t1", "read", "key", "192.0.2.1")
LIMITS = {Kind.READ: 3, Kind.WRITE: 1}

_PRELUDE = """
import fcntl, os, struct, sys, time
from imageserver.runtime import slottable
from imageserver.core.errors import NoSlot, StateUnavailable
from imageserver.core.ports import Ticket
from imageserver.core.slots import Kind
TICKET = Ticket("theirs", "read", "key", "192.0.2.1")
table = slottable.SharedTable(sys.argv[1], {Kind.READ: 3, Kind.WRITE: 1})
"""

_HOLD = """
slot = table.claim(Kind[sys.argv[2]], TICKET, alone=sys.argv[3] == "True")
print("held", flush=True)
sys.stdin.readline()
"""


@contextlib.contextmanager
def holding(script: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Run a script from when it says ``held``; it should let go when it gets a line."""
    with _started(script, *arguments) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def python(script: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a script that uses the ``table`` in the directory that is its first argument."""
    return _started(_PRELUDE + script, *arguments)


def holder(
    directory: Path, kind: Kind, *, alone: bool = False
) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
    """Run a process that holds a slot, and the image ``key``, until it gets a line."""
    return holding(_PRELUDE + _HOLD, directory, kind.name, alone)


@contextlib.contextmanager
def stopped_in_guard(directory: Path) -> Iterator[None]:
    """Keep the table's guard, as a process would that is stopped within it."""
    fd = open_private(str(directory), "slots")
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _started(script: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
