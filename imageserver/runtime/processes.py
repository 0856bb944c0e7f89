# SPDX-License-Identifier: Apache-2.0
"""Which processes live: told from /proc, by pid and start time, for pids are reused (proc(5)).

A process that is being killed is alive and exiting at once: its last thread may be in a write(2).
"""

import contextlib
import os
from enum import Enum, auto
from pathlib import Path

from imageserver.core.slots import Owner
from imageserver.runtime.private import close_fd

#: proc(5), field 9: the kernel is ending the process, though its last thread may not be done yet.
_PF_EXITING = 0x4
#: More than /proc/PID/stat can have: 52 numbers, and a name of 64 bytes at most.
_STATUS_SIZE = 4096
#: How long a killed process may go on holding what it held.
EXIT_SECONDS = 5.0
EXIT_STEP_SECONDS = 0.001


def boot_id() -> bytes:
    """Return 16 bytes that differ between boots: start times count from the boot (proc(5))."""
    text = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    return bytes.fromhex(text.strip().replace("-", ""))


def namespace() -> int:
    """Return 64 bits that differ between namespaces in which pids or start times differ."""
    inodes = [0, 0]
    for index, name in enumerate(("pid", "time")):  # namespaces(7); the latter since Linux 5.6
        with contextlib.suppress(FileNotFoundError):
            inodes[index] = os.stat(f"/proc/self/ns/{name}").st_ino & 0xFFFFFFFF
    return inodes[0] | inodes[1] << 32


def is_proc_ours() -> bool:
    """Tell whether /proc is of this process's PID namespace: else no pid in it can be used."""
    try:
        return os.readlink("/proc/self") == str(os.getpid())
    except OSError:
        return False


class _Forks:
    """Counts the forks between the first process and this one: two processes never agree."""

    count = 0

    @classmethod
    def add(cls) -> None:
        cls.count += 1


os.register_at_fork(after_in_child=_Forks.add)


def forks() -> int:
    """Return a number that is another one in a forked child; quicker than getpid(2)."""
    return _Forks.count


def _status(pid: int) -> list[bytes] | None:
    """Return the fields of /proc/PID/stat from the third on; None where there is no process."""
    try:
        fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
        try:
            line = os.read(fd, _STATUS_SIZE)
        finally:
            close_fd(fd)
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name, in parentheses, may hold anything: fields count from the last ")".
    return line.rpartition(b")")[2].split()


def owner_of(pid: int) -> Owner | None:
    """Return a running process's identity; None where it is gone, or a zombie without threads.

    A process that was killed looks like a zombie as soon as its first thread is gone. As
    long as another one is left, so are its connections and locks.
    """
    fields = _status(pid)
    if fields is None or (fields[0] in b"ZX" and int(fields[17]) <= 1):
        return None
    return Owner(pid, int(fields[19]))


class Life(Enum):
    """How a process is."""

    LIVING = auto()
    EXITING = auto()
    """It is gone in a moment; until then its files may be open, and a write under way."""
    DEAD = auto()


def life_of(owner: Owner) -> Life:
    """Tell how a process is: ``is_alive`` and ``is_exiting`` with one look."""
    fields = _status(owner.pid)
    if fields is None or int(fields[19]) != owner.start:
        return Life.DEAD
    if fields[0] in b"ZX":
        return Life.DEAD if int(fields[17]) <= 1 else Life.EXITING
    return Life.EXITING if int(fields[6]) & _PF_EXITING else Life.LIVING


def is_alive(owner: Owner) -> bool:
    """Tell whether this very process still has a thread."""
    return owner_of(owner.pid) == owner


def is_exiting(owner: Owner) -> bool:
    """Tell whether a process is gone or ending: the kernel drops its locks in a moment."""
    fields = _status(owner.pid)
    if fields is None or int(fields[19]) != owner.start:
        return True
    return fields[0] in b"ZX" or bool(int(fields[6]) & _PF_EXITING)
