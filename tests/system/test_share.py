# SPDX-License-Identifier: Apache-2.0
"""``imageserver share``: from files to URLs by one command that leaves nothing behind."""

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
from lab.processes import children

from tests.system.clients import reading
from tests.system.harness import ROOT, qemu_img, qemu_io, qemu_nbd, wait_until
from tests.system.moving import MIB, filled

SHARE = [sys.executable, "-m", "imageserver", "share"]


@dataclass
class Share:
    """A running ``share --json`` whose directory of temporary files is its own."""

    process: subprocess.Popen[str]
    tmp: Path
    lines: list[dict[str, Any]]
    family: list[int] = field(default_factory=list)

    @property
    def nbds(self) -> list[int]:
        """The pids of its qemu-nbds."""
        found = children(self.process.pid)
        return [pid for pid in found if b"qemu-nbd" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def url(self, number: int) -> str:
        return str(self.lines[number]["url"])

    def ends(self, status: int) -> str:
        """Wait for its end, and that nothing of it is left; return what it said."""
        output, errors = self.process.communicate(timeout=20)
        assert self.process.returncode == status, output + errors
        assert list(self.tmp.iterdir()) == []
        assert [pid for pid in self.family if Path(f"/proc/{pid}").exists()] == []
        return output + errors


def family(pid: int) -> list[int]:
    """Return the pids of all descendants."""
    return [each for child in children(pid) for each in (child, *family(child))]


@contextlib.contextmanager
def sharing(home: Path, *words: object, count: int = 1) -> Iterator[Share]:
    tmp = home / "tmp"
    tmp.mkdir(exist_ok=True)
    command = [*SHARE, "--json", *map(str, words)]
    environ = {k: v for k, v in os.environ.items() if not k.startswith("IMAGESERVER_")}
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environ | {"TMPDIR": str(tmp)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(count)]
            assert all(lines), process.communicate()
            shared = Share(process, tmp, [json.loads(line) for line in lines])
            shared.family = family(process.pid)
            yield shared
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()


def fetched(url: str, data: bytes | None = None, method: str = "GET", **headers: str) -> bytes:
    request = urllib.request.Request(url, data, headers, method=method)  # noqa: S310 - ours
    with urllib.request.urlopen(request, timeout=20) as answer:  # noqa: S310
        return bytes(answer.read())


def refused(url: str, data: bytes | None = None, method: str = "GET") -> int:
    with pytest.raises(urllib.error.HTTPError) as raised:
        fetched(url, data, method)
    raised.value.close()
    return raised.value.code


def reader(url: str) -> contextlib.AbstractContextManager[Any]:
    """Begin to read an image, and take no more than the head."""
    where = urlsplit(url)
    return reading(SimpleNamespace(port=where.port), where.path)  # type: ignore[arg-type]


def taken(sock: Any) -> int:
    """Take the rest of an answer; return how much that was."""
    return sum(map(len, iter(lambda: sock.recv(1 << 20), b"")))


@pytest.fixture
def overlay(home: Path) -> Path:
    """A qcow2 image with data, based on a raw file with data."""
    base = filled(home / "base.raw", 64 * MIB, (0, 2 * MIB))
    path = home / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", path)
    qemu_io(path, "qcow2", "write -P 7 1M 1M")
    return path


def test_lines_work_as_they_stand_and_a_signal_ends_all(overlay: Path, home: Path) -> None:
    raw = filled(home / "other.raw", 3 * MIB, (MIB, 2 * MIB))
    with sharing(home, overlay, raw, count=2) as shared:
        for source, told in zip((overlay, raw), shared.lines, strict=True):
            assert (told["file"], told["size"]) == (str(source), told["size"])
            copies = home / "copies"
            copies.mkdir(exist_ok=True)
            for line in (told["curl"], told["imagectl"]):
                subprocess.run(line, shell=True, check=True, cwd=copies, capture_output=True)  # noqa: S602 - as printed
            copied = sorted(copies.iterdir())
            assert [path.name for path in copied] == [
                f"{source.stem}.copy.qcow2",
                f"{source.stem}.copy.raw",
            ]
            for copy in copied:
                assert "identical" in qemu_img("compare", "-U", copy, source)
                copy.unlink()
        zero = next(extent for extent in json.loads(fetched(shared.url(0) + "/extents")))
        assert "hole" in zero
        with pytest.raises(subprocess.CalledProcessError):  # QEMU finds it in use
            qemu_io(raw, "raw", "write 0 512")
        fetched(shared.url(1), b"written", "PATCH", Range="bytes=0-6")
        shared.process.send_signal(signal.SIGINT)
        assert shared.ends(0) == ""
    assert raw.read_bytes()[:7] == b"written"


def test_read_only_is_kept_and_a_bitmap_tells_changes(home: Path) -> None:
    path = home / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "8M")
    qemu_img("bitmap", "--add", "-f", "qcow2", path, "b0")
    qemu_io(path, "qcow2", "write -P 7 1M 64k")
    with sharing(home, "--read-only", "--bitmap", "b0", path) as shared:
        changes = json.loads(fetched(shared.url(0) + "/extents?context=dirty"))
        assert [each["start"] for each in changes if each["dirty"]] == [MIB]
        assert refused(shared.url(0), b"x", "PUT") == 405
        shared.process.send_signal(signal.SIGHUP)
        assert shared.ends(0) == ""


def test_a_drain_finishes_what_runs_and_a_second_signal_does_not(home: Path) -> None:
    raw = filled(home / "disk.raw", 64 * MIB, (0, MIB))
    for number, is_whole in ((signal.SIGTERM, True), (signal.SIGINT, False)):
        with sharing(home, raw) as shared, reader(shared.url(0)) as sock:
            assert shared.process.stderr is not None
            shared.process.send_signal(number)
            assert "waiting for 1 transfer to finish" in shared.process.stderr.readline()
            if is_whole:
                assert taken(sock) == 64 * MIB
            else:
                shared.process.send_signal(number)
            shared.ends(0 if is_whole else 130)


def test_a_killed_share_leaves_nothing(overlay: Path, home: Path) -> None:
    with sharing(home, overlay) as shared, reader(shared.url(0)):
        shared.process.kill()
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in shared.family), 20)
        wait_until(lambda: not list(shared.tmp.iterdir()))
        qemu_io(overlay, "qcow2", "write -P 1 0 64k")  # nobody has its lock


def test_a_qemu_nbd_that_dies_is_reported_and_the_others_go_on(home: Path) -> None:
    files = [filled(home / f"{name}.raw", MIB, (0, MIB)) for name in ("one", "two")]
    files = [_qcow2(path) for path in files]
    with sharing(home, *files, count=2) as shared:
        os.kill(shared.nbds[0], signal.SIGKILL)
        assert shared.process.stdout is not None
        told = json.loads(shared.process.stdout.readline())
        assert (told["file"], told["error"]) == (
            str(files[0]),
            "its qemu-nbd was killed by SIGKILL",
        )
        wait_until(lambda: refused(shared.url(0)) == 404)
        assert len(fetched(shared.url(1))) == MIB
        shared.process.send_signal(signal.SIGTERM)
        assert f"{files[0]} is not shared any more" in shared.ends(1)


def _qcow2(path: Path) -> Path:
    image = path.with_suffix(".qcow2")
    qemu_img("convert", "-f", "raw", "-O", "qcow2", path, image)
    return image


def test_a_remote_image_is_shared_when_asked(home: Path) -> None:
    raw = filled(home / "disk.raw", MIB, (0, MIB))
    # By NBD: QEMU's driver for http loses a wake-up now and then, and hangs (7.2).
    with qemu_nbd(raw, sock=home / "remote.sock") as sock:
        words = ("--allow-remote", "--read-only", f"nbd+unix:///?socket={sock}")
        with sharing(home, *words) as shared:
            assert fetched(shared.url(0)) == raw.read_bytes()
            assert refused(shared.url(0), bytes(MIB), "PUT") == 405


@contextlib.contextmanager
def on_terminal(home: Path, *words: object) -> Iterator[tuple[int, Callable[[str], str]]]:
    """Run ``share`` on a terminal; yields its pid, and what waits for a text on the screen.

    The terminal is closed at the end, as its window would be.
    """
    (home / "tmp").mkdir()
    pid, fd = pty.fork()
    if not pid:
        environ = os.environ | {"TERM": "xterm", "COLUMNS": "120", "TMPDIR": str(home / "tmp")}
        os.chdir(ROOT)
        os.execve(SHARE[0], [*SHARE, *map(str, words)], environ)  # noqa: S606 - beside pytest
    seen = ""

    def waits(text: str) -> str:
        nonlocal seen
        while text not in seen:
            seen += os.read(fd, 65536).decode(errors="replace")
        return seen

    try:
        yield pid, waits
    finally:
        os.close(fd)


@pytest.mark.filterwarnings("ignore:.*forkpty:DeprecationWarning")
def test_a_terminal_shows_transfers_and_its_end_ends_all(home: Path) -> None:
    raw = filled(home / "disk.raw", 64 * MIB, (0, MIB))
    with on_terminal(home, raw) as (pid, waits):
        shown = waits("Ctrl-C ends it.")
        url = next(word for word in shown.split() if word.startswith("http://"))
        with reader(url):
            waits("1 transfer ")
            waits("disk.raw")
        below = family(pid)
    ended, status = os.waitpid(pid, 0)
    assert (ended, os.waitstatus_to_exitcode(status)) == (pid, 0)
    assert list((home / "tmp").iterdir()) == []
    assert [each for each in below if Path(f"/proc/{each}").exists()] == []
