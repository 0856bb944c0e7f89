# SPDX-License-Identifier: Apache-2.0
"""Deaths in the middle of imagectl's work: it goes on by itself, or where it was when run again."""

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.system.harness import Server, nbdkit, qemu_nbd, wait_until
from tests.system.killing import is_running
from tests.system.moving import (
    IMAGECTL,
    MIB,
    assert_same,
    data,
    filled,
    finish,
    imagectl,
    offer,
    running,
    taken,
)
from tests.system.skips import needs
from tests.system.watching import Admin

SIZE = 16 * MIB
#: So much has been moved when something happens.
MIDDLE = SIZE // 4
#: Bytes per second.
_SLOW, _FAST = 8 * MIB, 10_000 * MIB
#: At the slow rate it takes longer than imagectl takes to note how far it is.
LONG = 4 * SIZE


@dataclass
class Disk:
    """An image behind a slow NBD server."""

    path: Path
    sock: Path
    pid: int
    rate: Path

    def hurry(self) -> None:
        """Be slow no more."""
        self.rate.write_text(str(8 * _FAST))


@contextlib.contextmanager
def slow(path: Path, *errors: str) -> Iterator[Disk]:
    """Serve an image at a rate at which the middle of a transfer is easy to meet.

    ``errors`` are what nbdkit's error filter is told.
    """
    sock, pid, rate = (path.with_suffix(suffix) for suffix in (".sock", ".pid", ".rate"))
    limits = (f"rate={8 * _SLOW}", f"rate-file={rate}", "burstiness=0.1")
    filters = ("--filter=rate", "--filter=error")[: 1 + bool(errors)]
    # One thread for each connection: nbdkit 1.32 aborts where a client hangs up on two.
    options = ("--threads=1", *filters, f"--pidfile={pid}")
    with nbdkit(sock, *options, "file", str(path), *limits, *errors):
        # nbdkit listens before it writes the file.
        yield Disk(path, sock, int(wait_until(lambda: pid.exists() and pid.read_text())), rate)


@pytest.fixture(scope="module")
def server(workplace: Path) -> Iterator[Server]:
    admin = Admin(workplace / "admin")
    settings = {"backend_timeout": 1, "max_writers": 2, "admin_bind": admin.bind}
    with Server(workplace, **settings) as running_server:
        yield running_server


def kill_server(server: Server, disk: Disk) -> None:
    """SIGKILL master and workers; start the server again."""
    assert server.process is not None
    pids = [server.process.pid, *server.worker_pids()]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    server.process.wait()
    wait_until(lambda: not any(map(is_running, pids)))
    server.start()


def kill_worker(server: Server, disk: Disk) -> None:
    """SIGKILL a worker that moves the image's bytes."""
    transfers = Admin(server.directory / "admin").transfers()
    worker = next(t["worker"] for t in transfers if t["operation"] in {"read", "write"})
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: not is_running(worker))


def stall_disk(server: Server, disk: Disk) -> None:
    """Stop the NBD server until the image server has given it up."""
    before = server.log.count("BackendTimeout")
    os.kill(disk.pid, signal.SIGSTOP)
    try:
        wait_until(lambda: server.log.count("BackendTimeout") > before, 30)
    finally:
        os.kill(disk.pid, signal.SIGCONT)


Event = Callable[[Server, Disk], None]
EVENTS = pytest.mark.parametrize("event", [kill_server, kill_worker, stall_disk])


@EVENTS
def test_a_download_goes_on(server: Server, home: Path, event: Event):
    copy = home / "copy.raw"
    with slow(filled(home / "disk.raw", SIZE, (0, SIZE))) as disk:
        url = offer(server, disk.sock)
        with running("download", url, copy, "--connections", 2) as moving:
            wait_until(lambda: sum(map(taken, home.glob("copy*"))) >= MIDDLE, 30)
            event(server, disk)
            assert moving.poll() is None
            disk.hurry()
            finish(moving)
        assert_same(disk.path, copy)
    assert list(home.glob("copy*")) == [copy]


@EVENTS
def test_an_upload_goes_on(server: Server, home: Path, event: Event):
    image = filled(home / "image.raw", SIZE, (0, SIZE // 2), (SIZE // 2 + MIB, SIZE))
    with slow(filled(home / "disk.raw", SIZE)) as disk:
        url = offer(server, disk.sock)
        with running("upload", image, url, "--connections", 2) as moving:
            wait_until(lambda: taken(disk.path) >= MIDDLE, 30)
            event(server, disk)
            assert moving.poll() is None
            disk.hurry()
            finish(moving)
        assert_same(image, disk.path)


def kill_when_noted(moving: subprocess.Popen[str], home: Path) -> None:
    """SIGKILL a download once it has noted that something of it is done."""

    def is_noted() -> bool:
        states = home.glob("copy*.state")
        return any(json.loads(state.read_text())["done"] for state in states)

    wait_until(is_noted, 30)
    assert moving.poll() is None
    moving.kill()
    moving.wait()


def test_a_killed_download_goes_on_where_it_was(server: Server, home: Path):
    copy = home / "copy.raw"
    with slow(filled(home / "disk.raw", LONG, (0, LONG))) as disk:
        url = offer(server, disk.sock)
        with running("download", url, copy, "--connections", 1) as moving:
            kill_when_noted(moving, home)
        assert not copy.exists()
        disk.hurry()
        again = json.loads(imagectl("download", url, copy, "--json").stdout)
        assert again["resumed"] > 0
        assert again["moved"] == LONG - again["resumed"]
        assert_same(disk.path, copy)
    assert list(home.glob("copy*")) == [copy]


def test_half_an_update_goes_nowhere_until_it_is_whole(server: Server, home: Path):
    copy, target = filled(home / "copy.raw", LONG, (0, LONG)), filled(home / "target.raw", LONG)
    with slow(filled(home / "disk.raw", LONG, (0, LONG))) as disk, qemu_nbd(target) as sock:
        url = offer(server, disk.sock)
        with running("download", url, copy, "--incremental", "--connections", 1) as moving:
            kill_when_noted(moving, home)
        state = Path(f"{copy}.incremental.state")
        said = imagectl("upload", copy, offer(server, sock), status=5).stderr
        assert said == (
            f"imagectl: {copy} is the rest of an interrupted download, as {state} tells: "
            "download it to its end first\n"
        )
        assert data(target) == []
        disk.hurry()
        again = json.loads(imagectl("download", url, copy, "--incremental", "--json").stdout)
        assert 0 < again["resumed"] == LONG - again["moved"]
        assert not state.exists()
        imagectl("upload", copy, offer(server, sock))
    assert_same(disk.path, target)


def test_a_full_disk_ends_an_upload_and_the_images_state_is_told(server: Server, home: Path):
    image, full = filled(home / "image.raw", SIZE, (0, SIZE)), home / "full"
    errors = ("error-pwrite=ENOSPC", "error-pwrite-rate=1", f"error-pwrite-file={full}")
    with slow(filled(home / "disk.raw", SIZE), *errors) as disk:
        url = offer(server, disk.sock)
        with running("upload", image, url) as moving:
            wait_until(lambda: taken(disk.path) >= MIDDLE, 30)
            full.touch()
            assert finish(moving, 1) == (
                f"imagectl: 127.0.0.1:{server.port} answered PUT with 507: no space left; "
                "the image on the server may be part old, part new\n"
            )
        disk.hurry()
        full.unlink()
        imagectl("upload", image, url)
    assert_same(image, disk.path)


def test_a_killed_upload_is_whole_when_run_again(server: Server, home: Path):
    image = filled(home / "image.raw", SIZE, (0, SIZE))
    with slow(filled(home / "disk.raw", SIZE)) as disk:
        url = offer(server, disk.sock)
        with running("upload", image, url) as moving:
            wait_until(lambda: taken(disk.path) >= MIDDLE, 30)
            assert moving.poll() is None
            moving.kill()
        disk.hurry()
        imagectl("upload", image, url)
        assert_same(image, disk.path)


_ON_A_SMALL_DISK = """
mount -t tmpfs -o size=8m tmpfs "$1" || exit 99
"${@:3}" "$1/copy.raw"
echo "status $?"
mount -o remount,size=64m "$1"
"${@:3}" "$1/copy.raw"
cp --sparse=always "$1/copy.raw" "$2"
"""


@needs("mounts")
def test_a_full_disk_ends_a_download_that_goes_on_when_there_is_room(server: Server, home: Path):
    small = home / "small"
    small.mkdir()
    with slow(filled(home / "disk.raw", SIZE, (0, SIZE))) as disk:
        disk.hurry()
        url = offer(server, disk.sock)
        command = ["unshare", "--mount", "bash", "-c", _ON_A_SMALL_DISK, "-", small]
        command += [home / "copy.raw", *IMAGECTL, "download", "--quiet", url]
        ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert ended.stdout == "status 5\n", ended.stderr
        assert "No space left on device" in ended.stderr
        assert ended.stderr.count("\n") == 1
        assert_same(disk.path, home / "copy.raw")


def test_a_second_interrupt_ends_a_download_whose_qemu_nbd_is_stopped(home: Path, serve):
    """Only the first Ctrl-C waits until what has come is on stable storage."""
    data = os.urandom(LONG)
    liar, stopped = serve(data), []

    def stop(start: int) -> None:
        if start and not stopped:
            children = Path(f"/proc/{moving.pid}/task/{moving.pid}/children").read_text()
            stopped.append(int(children))
            os.kill(stopped[0], signal.SIGSTOP)

    liar.hook = stop
    with running("download", liar.url, home / "copy", "--format", "qcow2") as moving:
        wait_until(lambda: stopped, 30)
        moving.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):  # it hopes for qemu-nbd's answer
            moving.wait(1)
        moving.send_signal(signal.SIGINT)
        assert finish(moving, 130, 10).endswith("imagectl: interrupted.\n")
    assert not is_running(stopped[0])
