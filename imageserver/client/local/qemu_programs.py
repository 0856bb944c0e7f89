# SPDX-License-Identifier: Apache-2.0
"""QEMU's programs: started with descriptors instead of names, their errors as our sentences."""

import contextlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Collection, Iterable, Mapping
from typing import IO

from imageserver.client.failures import LocalFailure

#: How long qemu-nbd may write what it holds, and how long a killed one may take, in seconds.
END_SECONDS, _STOP_SECONDS = 120.0, 5.0
#: How programs call an image that was given to them as JSON.
_CALLED = re.compile(r"(?:Could not open|Failed to blk_new_open) '?json:\{.*\}'?: ")
_PREFIX = re.compile(r"qemu-(?:img|nbd): ")
_DESCRIPTOR = re.compile(r"/proc/self/fd/([0-9]+)")
#: Most of what a program says that is kept, in bytes: a damaged image has a line a cluster.
_KEPT_BYTES = 64 * 1024

#: Paths by the descriptors that programs know them by.
Names = Mapping[int, str]


def as_filename(node: Mapping[str, object]) -> str:
    """Return what a program takes for the file name of an image in words."""
    return "json:" + json.dumps(node)


def qemu_img(*arguments: str, names: Names) -> None:
    """Run qemu-img with these files.

    Raises:
        LocalFailure: it failed.
    """
    status, _output, said = run("qemu-img", arguments, names)
    if status:
        raise LocalFailure(reason(said, names) or "qemu-img failed")


def run(program: str, arguments: Iterable[str], names: Names) -> tuple[int, str, str]:
    """Run a program; return its status, its output, and the beginning of what it complains of."""
    with subprocess.Popen(  # noqa: S603 - a list, no shell
        [_program(program), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=list(names),
    ) as started:
        try:
            assert started.stdout is not None  # noqa: S101 - for the types
            assert started.stderr is not None  # noqa: S101
            said = _beginning(started.stderr)  # what it prints is short, and comes at the end
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


def start_nbd(
    filename: str, sock: str, shared: int, fds: Collection[int], *, writable: bool
) -> "subprocess.Popen[str]":
    """Start a qemu-nbd that serves an image in words to so many connections, then ends."""
    command = [
        _program("qemu-nbd"),
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
        start_new_session=True,  # the terminal's Ctrl-C is for imagectl, which ends it in order
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
        server.kill()  # also where Ctrl-C has ended the waiting; of what has ended, nothing
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(_STOP_SECONDS)
        if server.stderr:
            server.stderr.close()


def reason(said: str, names: Names) -> str:
    """Return a program's last sentence, with the paths that it was not told."""
    line = _PREFIX.sub("", said.strip().rpartition("\n")[2])
    line = _CALLED.sub("", line)
    return _DESCRIPTOR.sub(lambda found: names.get(int(found[1]), found[0]), line)


def _program(name: str) -> str:
    # A Debian user's PATH has no /usr/sbin, where some distributions have servers.
    path = shutil.which(name, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")
    if path is None:
        raise LocalFailure(f"{name} is missing: qcow2 needs QEMU's tools (qemu-utils, qemu-img)")
    return path
