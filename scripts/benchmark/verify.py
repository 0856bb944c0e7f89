# SPDX-License-Identifier: Apache-2.0
"""Proof that the bytes that were moved are the right ones. Always outside of timed parts."""

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from lab.model import WrongBytes
from lab.processes import program
from lab.wire import Wire

from benchmark.watching import timed

_PIECE = 1 << 20
_EXTENT = re.compile(rb'\{"start":([0-9]+),"length":([0-9]+),"zero":(true|false)\}')


def expect(found: object, wanted: object, where: str) -> None:
    """Raise ``WrongBytes`` unless both are the same: speed is then of no interest."""
    if found != wanted:
        raise WrongBytes(f"{where}: {str(found)[:80]} instead of {str(wanted)[:80]}")


def digest(path: Path, *spans: tuple[int, int]) -> str:
    """Return the SHA-256 of (start, length) spans of a file, one after the other."""
    wanted = hashlib.sha256()
    with path.open("rb") as file:
        for start, length in spans:
            file.seek(start)
            left = length
            while left and (piece := file.read(min(left, _PIECE))):
                wanted.update(piece)
                left -= len(piece)
    return wanted.hexdigest()


def nbdinfo(sock: Path) -> list[str]:
    """Return the command that maps an export."""
    return [program("nbdinfo"), "--map", f"nbd+unix:///?socket={sock}"]


def map_digest(sock: Path) -> tuple[int, str]:
    """Return how many extents nbdinfo finds, and a hash of them."""
    _, found = timed(nbdinfo(sock))
    # offset, length, flags (hole 1, zero 2), their names
    fields = (line.split(None, 3) for line in found.splitlines())
    return _fold((start, length, int(flags) & 3 != 0) for start, length, flags, _ in fields)


def answer_digest(port: int, path: str) -> tuple[int, str]:
    """Return the same of what the image server answers."""
    with Wire(port, 60) as wire:
        wire.ask("GET", path)
        answer = wire.answer()
    expect(answer.status, 200, path)
    found = (match.groups() for match in _EXTENT.finditer(answer.body))
    return _fold((start, length, zero == b"true") for start, length, zero in found)


def _fold(extents: Iterable[tuple[bytes, bytes, bool]]) -> tuple[int, str]:
    wanted = hashlib.sha256()
    count = 0
    for start, length, zero in extents:
        wanted.update(b"%d %d %d\n" % (int(start), int(length), zero))
        count += 1
    return count, wanted.hexdigest()
