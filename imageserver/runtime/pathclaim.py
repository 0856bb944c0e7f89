# SPDX-License-Identifier: Apache-2.0
"""The path of a runtime directory, claimed in the kernel by the processes that were started on it.

Locks and slots bind whoever opens the same files. A server whose runtime directory was removed or
replaced still has the old files; one that is started then would make new ones, and let a second
holder in. So a server binds an abstract Unix socket (unix(7)) named by a hash of the path, and
its children inherit the descriptor: the name is taken for as long as one of them lives, and
nobody can remove it. Three cases for who finds it taken:

1. Somebody holds the slot table that is at the path now (``tablefile.is_used``): the same server,
   an upgrade (SIGUSR2), or the workers of a killed master, with counts that are true. It goes on,
   and takes the name when it is free.
2. Nobody does: those that have the name have lost their directory. It must not start.
3. No process that has it can be seen, or each means another directory by this path (another mount
   namespace): they are no processes of ours.

The name counts within one network namespace.
"""

import contextlib
import errno
import hashlib
import os
import socket

from imageserver.runtime.private import close_fd


class PathClaim:
    """The claim of a path, for this process and the children that it forks."""

    def __init__(self, path: str) -> None:
        """Name the path; nothing is claimed yet."""
        self._path = path
        self._fd = -1

    def take(self) -> bool:
        """Claim the path; False: others have it, or no socket can be made now. For one thread."""
        if self._fd < 0:
            # Not inheritable over exec(2): what an upgrade or a helper runs is not this server.
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
                sock.bind(_name(self._path))
                self._fd = sock.detach()
        return self._fd >= 0

    def close(self) -> None:
        """Give the claim up, as far as this process has it. May be called twice."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            close_fd(fd)


def claimants(path: str) -> list[int]:
    """Return the processes that have claimed a path, and mean this very place by it.

    Changes nothing, and sees only processes of this user, or all of them for root.
    """
    inode = _inode(_name(path))
    if inode is None:
        return []
    pids = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
    return sorted(pid for pid in pids if _has(pid, inode) and _means(pid, path))


def _name(path: str) -> bytes:
    real = os.path.realpath(os.fsencode(path))
    return b"\0imageserver/" + hashlib.sha256(real).hexdigest().encode()


def _inode(name: bytes) -> bytes | None:
    """Return the number of the socket that has an abstract name (/proc/net/unix, proc(5))."""
    shown = b"@" + name[1:]
    with open("/proc/net/unix", "rb") as file:
        for line in file:
            fields = line.split()
            if fields[-1] == shown:
                return fields[-2]
    return None


def _has(pid: int, inode: bytes) -> bool:
    """Tell whether a process has a socket open. False where it is gone, or another user's."""
    directory = b"/proc/%d/fd" % pid
    with contextlib.suppress(OSError):
        for fd in os.listdir(directory):
            with contextlib.suppress(FileNotFoundError):
                if os.readlink(os.path.join(directory, fd)) == b"socket:[%s]" % inode:
                    return os.stat(b"/proc/%d" % pid).st_uid == os.geteuid()
    return False


def _means(pid: int, path: str) -> bool:
    """Tell whether the path is in the same directory for another process as for this one."""
    parent = os.path.dirname(os.path.realpath(os.fsencode(path)))
    try:
        theirs = os.stat(b"/proc/%d/root" % pid + parent)
        return os.path.samestat(theirs, os.stat(parent))
    except OSError as exc:
        return exc.errno in {errno.EACCES, errno.EPERM}  # then it is not told
