# SPDX-License-Identifier: Apache-2.0
"""Calls of the C library that fail, in a process that was started for it (``faults.c``).

The library is preloaded: what Python, libnbd and the standard library ask of the system goes
through it, and costs nothing noticeable until a fault is armed. So one process can go through
thousands of faults.
"""

import ctypes
import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from lab.processes import program

_SOURCE = Path(__file__).with_name("faults.c")
#: Names the library in the environment of a process that is to have it.
VARIABLE = "LD_PRELOAD"


def build(directory: Path) -> dict[str, str]:
    """Compile the library into ``directory``; return what the environment must say for it."""
    library = directory / "faults.so"
    command = [program("cc"), "-O1", "-Wall", "-Werror", "-shared", "-fPIC"]
    subprocess.run([*command, f"-o{library}", str(_SOURCE), "-ldl"], check=True)
    return {VARIABLE: str(library)}


def is_loaded(environ: Mapping[str, str] = os.environ) -> bool:
    """Tell whether this process has the library."""
    return environ.get(VARIABLE, "").endswith("/faults.so")


class Faults:
    """The library, as the process that has it uses it."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None)
        self._library.faults_arm.argtypes = [ctypes.c_long, ctypes.c_int]
        self._library.faults_arm.restype = None
        self._library.faults_disarm.restype = ctypes.c_char_p

    def arm(self, nth: int, error: int) -> None:
        """Let the ``nth`` call from now on fail; once, in whichever thread."""
        self._library.faults_arm(nth, error)

    def disarm(self) -> str:
        """Let nothing fail; return the name of the call that has failed, or ""."""
        return (self._library.faults_disarm() or b"").decode()

    @contextmanager
    def recording(self, file: Path) -> Iterator[int]:
        """Write what the block changes to ``file``; yield its descriptor, for other lines."""
        fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC)
        self._library.faults_record(fd)
        try:
            yield fd
        finally:
            self._library.faults_record(-1)
            os.close(fd)
