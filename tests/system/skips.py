# SPDX-License-Identifier: Apache-2.0
"""What a machine may be unable to do: the only tests that are ever skipped, and why.

A test marked ``needs("name")`` runs wherever the machine can; nothing else skips.
"""

import contextlib
import os
import platform
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import NamedTuple

import pytest

from tests.system.limiting import can_limit_threads


class Ability(NamedTuple):
    """Something a test needs of the machine: a name, why it may lack, whether it is there."""

    name: str
    reason: str
    is_there: Callable[[], bool]


def _succeeds(*command: str) -> bool:
    """Tell whether the machine lets a program do this. One that is missing fails its tests."""
    return shutil.which(command[0]) is None or not subprocess.call(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def _loop_devices() -> bool:
    return os.geteuid() == 0 and _succeeds("losetup", "--find")


def _mounts() -> bool:
    return _succeeds("unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt")


def _pid_namespaces() -> bool:
    return _succeeds("unshare", "--pid", "--fork", "--mount-proc", "true")


def _boots() -> bool:
    mounts = """
    mount -t tmpfs tmpfs /mnt && mkdir /mnt/upper /mnt/work /mnt/root &&
        mount -t overlay overlay -o lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work /mnt/root &&
        mount -t proc proc /mnt/root/proc && mount -t cgroup2 cgroup2 /mnt/root/sys &&
        mkdir /mnt/root/sys/$0 && rmdir /mnt/root/sys/$0
    """
    probe = f"is-probe-{secrets.token_hex(8)}"  # others may be probing, each as process 1
    namespaces = ("--mount", "--pid", "--fork", "--uts", "--ipc", "--cgroup")
    return os.geteuid() == 0 and _succeeds("unshare", *namespaces, "sh", "-c", mounts, probe)


def _xattrs() -> bool:
    with tempfile.NamedTemporaryFile() as file:
        try:
            os.setxattr(file.name, "user.test", b"1")
        except OSError:
            return False
    return True


def _page_cache() -> bool:
    with tempfile.NamedTemporaryFile() as file:
        os.write(file.fileno(), b"1")
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT)
        except OSError:
            return True
    return False


def _ipv6() -> bool:
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


def beside_python(name: str) -> str | None:
    """Return the path of a program in .venv, where scripts/setup has put some, or elsewhere."""
    own = os.path.dirname(sys.executable)
    return shutil.which(name, path=os.pathsep.join((own, os.environ.get("PATH", os.defpath))))


def _prometheus() -> bool:
    return None not in {beside_python(name) for name in ("prometheus", "promtool")}


def chromium() -> str | None:
    """Return the path of the distribution's Chromium; Ubuntu's is a snap, not for scripts."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    return None if found and os.path.realpath(found).startswith("/usr/bin/snap") else found


ABILITIES: tuple[Ability, ...] = (
    Ability("loop devices", "needs root and /dev/loop*", _loop_devices),
    Ability("mounts", "needs root and mount namespaces", _mounts),
    Ability("PID namespaces", "needs root and PID namespaces", _pid_namespaces),
    Ability("booting", "needs root, namespaces, overlays and cgroup2 to write to", _boots),
    Ability("IPv6", "the host has no IPv6", _ipv6),
    Ability("x86-64", "system calls have other numbers", lambda: platform.machine() == "x86_64"),
    Ability("owners", "only root can give files away", lambda: os.geteuid() == 0),
    Ability("xattrs", "the temporary directory has no user attributes", _xattrs),
    Ability("page cache", "the temporary directory is not on a disk", _page_cache),
    Ability("ptrace", "strace may not trace here", lambda: _succeeds("strace", "-f", "true")),
    Ability("thread limits", "root needs a cgroup that limits tasks", can_limit_threads),
    Ability("prometheus", "prometheus or promtool is missing: scripts/setup says why", _prometheus),
    Ability("chromium", "Chromium is missing: scripts/setup says why", lambda: bool(chromium())),
)


def needs(name: str) -> pytest.MarkDecorator:
    """Skip a test where the machine lacks this ability."""
    ability = next(ability for ability in ABILITIES if ability.name == name)
    return pytest.mark.skipif(not ability.is_there(), reason=f"{name}: {ability.reason}")
