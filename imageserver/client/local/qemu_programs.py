# SPDX-License-Identifier: Apache-2.0
"""QEMU's programs: they get descriptors instead of file names, their errors become sentences."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import IO

from imageserver.client.failures import LocalFailure

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
#: How long qemu-nbd may write at its end, and how long a killed one may take, in seconds.
END_SECONDS, _STOP_SECONDS = 120.0, 5.0
#: What they say of an image that another one has open.
LOCKED = re.compile("Failed to get .* lock")
#: The beginning of errors about an image that was given as JSON.
_CALLED = re.compile(r"(?:Could not open|Failed to blk_new_open) '?json:\{.*\}'?: ")
_PREFIX = re.compile(r"qemu-(?:img|nbd): ")
_DESCRIPTOR = re.compile(r"/proc/self/fd/([0-9]+)")
#: Bytes of a program's stderr that are kept: for a damaged image it has a line for each cluster.
_KEPT_BYTES = 64 * 1024

#: Paths by descriptor, to name files in a program's errors.
Names = Mapping[int, str]


def as_filename(node: Mapping[str, object]) -> str:
    """Return the file name argument that stands for an image given as nodes."""
    return "json:" + json.dumps(node)


def qemu_img(*arguments: str, names: Names) -> None:
    """Run qemu-img with these files.

    Raises:
        LocalFailure: it failed.
    """
    status, _output, said = run("qemu-img", arguments, names)
    if status:
        raise LocalFailure(reason(said, names) or "qemu-img failed")


def run(name: str, arguments: Iterable[str], names: Names) -> tuple[int, str, str]:
    """Run a program; return its status, its stdout, and the beginning of its stderr."""
    with subprocess.Popen(  # noqa: S603 - a list, no shell
        [program(name), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=list(names),
    ) as started:
        try:
            assert started.stdout is not None  # noqa: S101 - for the types
            assert started.stderr is not None  # noqa: S101
            said = _beginning(started.stderr)  # its stdout is short, and fits into the pipe
            output = started.stdout.read()
        except BaseException:
            started.kill()
            raise
    return started.returncode, output.decode("utf-8", "replace"), said


def _beginning(stream: IO[bytes]) -> str:
    kept = b""
    while piece := stream.read(_KEPT_BYTES):
        kept += piece[: _KEPT_BYTES - len(kept)]
    return kept.decode("utf-8", "replace")


def death_signal(number: signal.Signals) -> Callable[[], None]:
    """Return what a new child calls so that it gets a signal when the thread that made it ends.

    Be it by SIGKILL (prctl(2)). The library is loaded here, before the fork. A parent that died in
    between is noticed.
    """
    import ctypes  # noqa: PLC0415 - takes time, and most commands start no program

    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)

    return ask


def start_nbd(
    filename: str, sock: str, shared: int, fds: Collection[int], *, writable: bool
) -> "subprocess.Popen[str]":
    """Start a qemu-nbd that serves so many connections, and ends after the last, or with us.

    To be called by the main thread, with which it ends.
    """
    command = [
        program("qemu-nbd"),
        f"--shared={shared}",
        f"--socket={sock}",
        *(["--discard=unmap"] if writable else ["--read-only"]),
        filename,
    ]
    return subprocess.Popen(  # noqa: S603 - a list, no shell
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        pass_fds=list(fds),
        preexec_fn=death_signal(signal.SIGTERM),  # noqa: PLW1509 - no piece is moved yet
        start_new_session=True,  # a terminal's Ctrl-C reaches imagectl only, which ends qemu-nbd
    )


def end(server: "subprocess.Popen[str]", *, kill: bool = False) -> None:
    """Wait for a qemu-nbd whose connections are closed, or kill it."""
    if kill:
        server.kill()
    try:
        server.wait(_STOP_SECONDS if kill else END_SECONDS)
    except subprocess.TimeoutExpired as exc:
        raise LocalFailure("qemu-nbd did not end") from exc
    finally:
        server.kill()  # after Ctrl-C, too; does nothing to a process that has ended
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(_STOP_SECONDS)
        if server.stderr:
            server.stderr.close()


def reason(said: str, names: Names) -> str:
    """Return the last line of a program's stderr, with paths in place of descriptors."""
    line = _PREFIX.sub("", said.strip().rpartition("\n")[2])
    line = _CALLED.sub("", line)
    return _DESCRIPTOR.sub(lambda found: names.get(int(found[1]), found[0]), line)


def program(name: str) -> str:
    """Return a program's path.

    Raises:
        LocalFailure: it is not installed.
    """
    # A Debian user's PATH has no /usr/sbin, where some distributions have servers.
    path = shutil.which(name, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")
    if path is None:
        raise LocalFailure(f"{name} is missing: qcow2 needs QEMU's tools (qemu-utils, qemu-img)")
    return path
