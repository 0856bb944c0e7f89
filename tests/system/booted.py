# SPDX-License-Identifier: Apache-2.0
"""A machine without a virtual one: systemd as process 1 of its own namespaces.

Its root is an overlay of this machine's, written to memory; /run, /dev, /proc and the control
groups below one made for it are its own, what belongs to the kernel can be read only, and nothing
is started but a journal. The network is shared, so a test's own sockets are the clients. When its
process 1 is killed, the kernel kills the rest and drops the mounts with them.
"""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.system.harness import ROOT, program, wait_until

_TARGET = "machine.target"
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}

# In a mount namespace of its own, with the place for it all as the first argument and what else
# must be visible there as the others: an overlay of a root does not show what is mounted below.
_PREPARE = """
set -eu
place=$1; shift
mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs "$place"
mkdir "$place/upper" "$place/work" "$place/root" "$place/cgroup"
mount -t cgroup2 cgroup2 "$place/cgroup"
mkdir "$place/cgroup/$(basename "$place")"
echo $$ >"$place/cgroup/$(basename "$place")/cgroup.procs"
mount -t overlay overlay \\
    -o "lowerdir=/,upperdir=$place/upper,workdir=$place/work" "$place/root"
cd "$place/root"
for seen; do
    mkdir -p "./$seen"
    mount --bind "$seen" "./$seen"
    mount -o remount,bind,ro "./$seen"
done
exec unshare --mount --pid --fork --kill-child --uts --ipc --cgroup sh -euc "$BOOT"
"""

_BOOT = """
mount -t proc proc proc
mount --bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs -o mode=755 tmpfs dev
mknod -m 666 dev/null c 1 3
mknod -m 666 dev/zero c 1 5
mknod -m 666 dev/full c 1 7
mknod -m 666 dev/random c 1 8
mknod -m 666 dev/urandom c 1 9
mkdir -m 1777 dev/shm
ln -s /proc/self/fd dev/fd
echo 0123456789abcdef0123456789abcdef >etc/machine-id
hostname machine
: >etc/fstab
rm -rf etc/systemd/system/*.wants usr/lib/systemd/system/*.wants lib/systemd/system/*.wants
printf '[Unit]\\nRequires=systemd-journald.service\\n' >etc/systemd/system/machine.target
pivot_root . mnt
umount -l mnt
mount --make-rshared /  # as systemd does where it does not think itself in a container
exec env -i container=machine PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --system \\
    --unit=machine.target --log-target=journal --show-status=no --crash-shell=no
"""


@dataclass(frozen=True)
class Machine:
    """A booted systemd; paths and process ids as this machine sees them."""

    init: int

    def path(self, path: str) -> Path:
        """Return the way from here to a file of the machine."""
        return Path(f"/proc/{self.init}/root{path}")

    def command(self, *command: object) -> list[str]:
        """Return what runs a command in the machine's file system; its pid is ours to see."""
        enter = [program("nsenter"), f"--target={self.init}", "--mount", "--ipc", "--uts"]
        return [*enter, "--root", "--wdns=/", *map(str, command)]

    def try_run(self, *command: object) -> subprocess.CompletedProcess[str]:
        """Run a command in all of the machine's namespaces."""
        enter = [program("nsenter"), f"--target={self.init}", "--all", "--root", "--wdns=/"]
        return subprocess.run(
            [*enter, *map(str, command)],
            env=_ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=110,  # pip on a busy machine
            check=False,
        )

    def run(self, *command: object) -> str:
        """Run a command that must succeed; return what it prints."""
        done = self.try_run(*command)
        assert done.returncode == 0, (shlex.join(map(str, command)), done.stdout, done.stderr)
        return done.stdout

    def show(self, unit: str, name: str) -> str:
        return self.run("systemctl", "show", f"--property={name}", "--value", unit).strip()

    def journal(self, unit: str) -> list[str]:
        """Return the messages of a unit's processes, without what the journal adds."""
        command = ("journalctl", "--output=cat", "--no-pager", f"_SYSTEMD_UNIT={unit}")
        return self.run(*command).splitlines()

    def processes(self, unit: str) -> list[int]:
        """Return the processes in a unit's control group, as this machine numbers them."""
        group = Path(f"/proc/{self.init}/root/sys/fs/cgroup/system.slice/{unit}/cgroup.procs")
        try:
            return [int(pid) for pid in group.read_text().split()]
        except FileNotFoundError:
            return []

    def numbers(self) -> dict[int, int]:
        """Return this machine's number of each process, by the booted one's."""
        namespace = os.readlink(f"/proc/{self.init}/ns/pid")
        found = {}
        for status in Path("/proc").glob("[0-9]*/status"):
            with contextlib.suppress(OSError):  # it has ended
                if os.readlink(status.parent / "ns" / "pid") == namespace:
                    fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines())
                    here, *_, there = map(int, fields["NSpid"].split())
                    found[there] = here
        return found

    def is_up(self) -> bool:
        return self.try_run("systemctl", "is-active", "--quiet", _TARGET).returncode == 0


@contextlib.contextmanager
def boot() -> Iterator[Machine]:
    """Boot a machine; end it, and everything in it, with the block."""
    with tempfile.TemporaryDirectory(prefix="is-boot-") as place, tempfile.TemporaryFile() as log:
        seen = sorted({str(ROOT), sys.prefix} - {sys.base_prefix})
        outer = subprocess.Popen(
            [program("unshare"), "--mount", "sh", "-c", _PREPARE, "sh", place, *seen],
            env=_ENVIRONMENT | {"BOOT": _BOOT},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        try:
            machine = Machine(wait_until(lambda: outer.poll() is not None or _init_of(outer), 20))
            wait_until(lambda: outer.poll() is not None or machine.is_up(), 20)
            log.seek(0)
            assert outer.poll() is None, log.read().decode(errors="replace")
            yield machine
        finally:
            _end(outer)
            wait_until(lambda: _remove_group(Path(place).name))


def _children(process: subprocess.Popen[bytes]) -> list[int]:
    listing = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(pid) for pid in listing.split()]


def _init_of(outer: subprocess.Popen[bytes]) -> int:
    """Return the pid of process 1, once that is systemd."""
    with contextlib.suppress(OSError):
        for pid in _children(outer):
            if Path(f"/proc/{pid}/comm").read_text() == "systemd\n":
                return pid
    return 0


def _end(outer: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError):
        for pid in _children(outer):
            os.kill(pid, signal.SIGKILL)
    try:
        outer.wait(10)
    except subprocess.TimeoutExpired:
        outer.kill()  # --kill-child: its child goes with it
        outer.wait()


def _remove_group(name: str) -> bool:
    """Remove the machine's control groups, innermost first, through a mount of our own."""
    script = """
    mount -t cgroup2 cgroup2 /mnt && cd /mnt && [ ! -d "$1" ] ||
        find "$1" -depth -type d -exec rmdir {} +
    """
    command = [program("unshare"), "--mount", "sh", "-c", script, "sh", name]
    return not subprocess.call(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
