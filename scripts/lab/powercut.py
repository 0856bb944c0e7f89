# SPDX-License-Identifier: Apache-2.0
"""What a disk may hold after a power cut, from the changes that ``faults`` has recorded.

A disk keeps what fsync(2) has been asked for: of a file its data, of a directory its names. Of
what came later it may keep any part: of data any of the writes, in any order; of names the first
ones, for file systems journal those. So each moment has many possible disks.

    write 12 0 6e6577      data is on the disk, or not, until   sync 12
    link 3 new 12          a name is there, or not, until       sync 3
"""

import itertools
import os
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

#: Which parts of what is not synced are tried besides none and all.
_PARTS = 3


@dataclass
class Disk:
    """What is on it for certain, and what may be: by inode, and by directory and name."""

    data: dict[int, bytes] = field(default_factory=dict)
    names: dict[tuple[int, str], int] = field(default_factory=dict)
    #: What was changed since the last sync, in this order.
    writes: dict[int, list[list[str]]] = field(default_factory=lambda: defaultdict(list))
    moves: list[list[str]] = field(default_factory=list)

    @classmethod
    def of(cls, *directories: Path) -> "Disk":
        """Return a disk that has what is in these directories now, all of it synced."""
        disk = cls()
        for directory in directories:
            parent = directory.stat().st_ino
            for path in directory.iterdir():
                inode = path.lstat().st_ino
                disk.names[parent, path.name] = inode
                if path.is_file():
                    disk.data[inode] = path.read_bytes()
        return disk

    def note(self, change: list[str]) -> None:
        """Take one recorded change."""
        what = change[0]
        if what == "sync":
            self._sync(int(change[1]))
        elif what in {"link", "unlink", "rename"}:
            self.moves.append(change)
        elif what in {"write", "truncate", "grow", "zero"}:
            self.writes[int(change[1])].append(change)

    def _sync(self, inode: int) -> None:
        self.data[inode] = _written(self.data.get(inode, b""), self.writes.pop(inode, []))
        synced = [move for move in self.moves if int(move[1]) == inode]
        self.names = _moved(self.names, synced)
        self.moves = [move for move in self.moves if int(move[1]) != inode]

    def outcomes(self, choose: random.Random) -> Iterator["Disk"]:
        """Yield disks that a cut may leave now, each with nothing unsynced."""
        for count in range(len(self.moves) + 1):
            names = _moved(self.names, self.moves[:count])
            for part in range(_PARTS + 2):
                data = dict(self.data)
                for inode, writes in self.writes.items():
                    kept = _part(writes, part, choose)
                    data[inode] = _written(data.get(inode, b""), kept)
                yield Disk(data, names)

    def read(self, path: Path) -> bytes | None:
        """Return a file's content by the path that it has on the real disk; None: it has none."""
        inode = self.names.get((path.parent.stat().st_ino, path.name))
        return None if inode is None else self.data.get(inode, b"")


def _part(writes: list[list[str]], part: int, choose: random.Random) -> list[list[str]]:
    if part == 0:
        return []
    if part == 1:
        return writes
    return [write for write in writes if choose.random() < 0.5]  # noqa: PLR2004 - as likely as not


def _written(data: bytes, writes: Iterable[list[str]]) -> bytes:
    found = bytearray(data)
    for what, _inode, *rest in writes:
        at = int(rest[0])
        if what == "truncate":
            found = found[:at] + bytes(max(0, at - len(found)))
            continue
        new = bytes.fromhex(rest[1]) if what == "write" else bytes(int(rest[1]))
        end = at + len(new)
        found += bytes(max(0, end - len(found)))
        if what != "grow":
            found[at:end] = new
    return bytes(found)


def _moved(
    names: dict[tuple[int, str], int], moves: Iterable[list[str]]
) -> dict[tuple[int, str], int]:
    found = dict(names)
    for what, directory, name, *rest in moves:
        at = int(directory), name
        if what == "link":
            found[at] = int(rest[0])
        elif what == "unlink":
            found.pop(at, None)
        elif at in found:
            found[int(rest[0]), rest[1]] = found.pop(at)
    return found


def cuts(before: Disk, record: Path, seed: int) -> Iterator[tuple[set[str], str, Disk]]:
    """Yield, for each moment of a record, disks that a cut may leave then.

    With the lines of the program's own that were there (``said NAME``), and what happened last.
    """
    disk, choose, said = deepcopy(before), random.Random(seed), set[str]()
    lines = [line.split(" ") for line in record.read_text().splitlines()]
    for change in itertools.chain([["begin"]], lines):
        if change[0] == "said":
            said.add(change[1])
        disk.note(change)
        for outcome in disk.outcomes(choose):
            yield said, " ".join(change)[:60], outcome


def say(record: int, name: str) -> None:
    """Note in a record that the program has answered."""
    os.write(record, f"said {name}\n".encode())
