# SPDX-License-Identifier: Apache-2.0
"""imagectl as users start it, images to move with it, and what shows that they have arrived."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tests.system.harness import Server, qemu_img, repeatable

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
#: As the console script, which need not be on the path.
IMAGECTL = [sys.executable, "-m", "imageserver.client"]


def imagectl(*arguments: object, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Run imagectl to its end, which must have this exit status."""
    command = [*IMAGECTL, *_explicit(arguments)]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == status, done.stderr + done.stdout
    return done


def _explicit(arguments: Sequence[object]) -> list[str]:
    """Say how many connections to use: the default depends on the machine's CPUs."""
    words = [str(argument) for argument in arguments]
    if words[0] in {"download", "upload"} and "--connections" not in words:
        words += ["--connections", "4"]
    return words


@contextlib.contextmanager
def running(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Run imagectl beside the block; it has ended after it."""
    command = [*IMAGECTL, *_explicit(arguments)]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as started:
        try:
            yield started
        finally:
            started.kill()


def finish(started: subprocess.Popen[str], status: int = 0, seconds: float = 60) -> str:
    """Wait for imagectl's end; return what it said on stderr."""
    output, errors = started.communicate(timeout=seconds)
    assert started.returncode == status, errors + output
    return errors


def offer(server: Server, sock: Path) -> str:
    """Make a transfer for an NBD server's default export; return the image's URL."""
    name = f"{sock.parent.name}-{sock.stem}"
    return f"http://127.0.0.1:{server.port}{server.add(name, socket=str(sock))}"


def offer_file(server: Server, path: Path) -> str:
    """Make a transfer for a file, which need not be there yet; return the image's URL."""
    name = f"{path.parent.name}-{path.stem}"
    return f"http://127.0.0.1:{server.port}{server.add(name, backend='file', file=str(path))}"


def filled(path: Path, size: int, *spans: tuple[int, int]) -> Path:
    """Make a sparse file with random bytes in these half-open spans."""
    source = repeatable(path.name)
    with path.open("wb") as file:
        file.truncate(size)
        for start, stop in spans:
            file.seek(start)
            file.write(source.randbytes(stop - start))
    return path


#: Name -> what makes such an image at a path; of whole sectors, for qemu-nbd serves no others.
IMAGES: dict[str, Callable[[Path], Path]] = {
    "random": lambda path: filled(path, 24 * MIB, (0, 24 * MIB)),
    "sparse": lambda path: filled(
        path, 4 * GIB, (0, MIB), (GIB, 9 * MIB + GIB), (4 * GIB - 64 * KIB, 4 * GIB)
    ),
    "fragmented": lambda path: filled(
        path, 3000 * 16 * KIB, *((n * 16 * KIB, n * 16 * KIB + 4 * KIB) for n in range(3000))
    ),
    "clusters": lambda path: filled(
        path, 1000 * 128 * KIB, *((n * 128 * KIB, n * 128 * KIB + 64 * KIB) for n in range(1000))
    ),
    "hole": lambda path: filled(path, GIB),
    "empty": lambda path: filled(path, 0),
    "sectors": lambda path: filled(path, 3 * MIB + 512, (MIB + 1024, 3 * MIB + 512)),
}


def data(path: Path) -> list[tuple[int, int]]:
    """Return the spans of an image that are not known to be zero, as qemu-img sees them."""
    spans: list[tuple[int, int]] = []
    for extent in json.loads(qemu_img("map", "--output=json", "-f", "raw", path)):
        if not extent["zero"]:
            start, stop = extent["start"], extent["start"] + extent["length"]
            if spans and spans[-1][1] == start:
                start = spans.pop()[0]
            spans.append((start, stop))
    return spans


def taken(path: Path) -> int:
    """Return the bytes that a file takes on its file system; 0 where there is none."""
    return os.stat(path).st_blocks * 512 if path.exists() else 0


def assert_same(source: Path, copy: Path, *, holes: bool = True) -> None:
    """Require the same bytes and, with ``holes``, the same allocation."""
    assert copy.stat().st_size == source.stat().st_size
    assert "identical" in qemu_img("compare", "-f", "raw", "-F", "raw", source, copy)
    if holes:
        assert data(copy) == data(source)
