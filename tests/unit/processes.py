# SPDX-License-Identifier: Apache-2.0
"""Other processes that use the slot table: scripts with a ``table`` and a ``TICKET`` of theirs."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from imageserver.ports import Ticket
from imageserver.slots import Kind

TICKET = Ticket("t1", "read", "key", "192.0.2.1")
LIMITS = {Kind.READ: 3, Kind.WRITE: 1}

_PRELUDE = """
import fcntl, os, struct, sys, time
from imageserver import shared
from imageserver.errors import NoSlot
from imageserver.ports import Ticket
from imageserver.slots import Kind
TICKET = Ticket("theirs", "read", "key", "192.0.2.1")
table = shared.SharedTable(sys.argv[1], {Kind.READ: 3, Kind.WRITE: 1})
"""

_HOLD = """
slot = table.claim(Kind[sys.argv[2]], TICKET)
print("held", flush=True)
sys.stdin.readline()
"""


def python(script: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a script; its first argument is the table's directory."""
    return subprocess.Popen(
        [sys.executable, "-c", _PRELUDE + script, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@contextlib.contextmanager
def holder(directory: Path, kind: Kind) -> Iterator[subprocess.Popen[str]]:
    """Run a process that holds a slot until it gets a line."""
    with python(_HOLD, directory, kind.name) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()
