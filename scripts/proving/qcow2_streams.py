# SPDX-License-Identifier: Apache-2.0
"""An image asked for as a qcow2 file, whole, in part, resumed; which answers are right.

The file of an image that nobody writes to is one: whoever gets other bytes, or fewer without a cut,
could not know. So a file that meets no fault is read as the specification says (QEMU,
docs/interop/qcow2.txt), and every other answer is compared with it.
"""

import struct
from collections.abc import Callable, Iterator

from proving.sweep import NotPrepared, Operation
from proving.world import Answer, World

_OK, _PARTIAL = 200, 206
#: Magic, version, backing file (offset, size), cluster_bits, size; then crypt_method.
_HEADER = struct.Struct(">4sIQIIQ4x")
_L1 = struct.Struct(">IQ")
_OFFSET = 0x00FF_FFFF_FFFF_FE00
_ENTRY = 8
#: A disk in a qcow2 file is whole sectors.
_SECTOR = 512


def disk_of(file: bytes) -> bytes:
    """Return the disk that a qcow2 file without a backing file holds.

    Raises:
        ValueError: the file is none.
    """
    try:
        magic, version, _, _, bits, size = _HEADER.unpack_from(file)
        l1_entries, l1_at = _L1.unpack_from(file, _HEADER.size)
        if (magic, version) != (b"QFI\xfb", 3):
            raise ValueError("not a qcow2 file of version 3")
        cluster, disk = 1 << bits, bytearray(size)
        per_table = cluster // _ENTRY
        for group, l2_entry in enumerate(struct.unpack_from(f">{l1_entries}Q", file, l1_at)):
            if not (l2_at := l2_entry & _OFFSET):
                continue
            for number, entry in enumerate(struct.unpack_from(f">{per_table}Q", file, l2_at)):
                if offset := entry & _OFFSET:
                    at = (group * per_table + number) * cluster
                    disk[at : at + cluster] = file[offset : offset + cluster]
    except struct.error as exc:
        raise ValueError("cut short") from exc
    return bytes(disk[:size])


class Qcow2Streams:
    """What is asked for of one image, at ``path``, that is ``disk``; with these parameters more."""

    def __init__(
        self,
        path: str,
        disk: bytes,
        parameters: str = "",
        prepare: Callable[[World], object] = lambda _world: None,
    ) -> None:
        self._target = f"{path}?format=qcow2{parameters}"
        self._disk = disk.ljust(-(-len(disk) // _SECTOR) * _SECTOR, b"\0")
        self._prepare_image = prepare
        #: What there is without faults, in this world.
        self._world: World | None = None
        self._file, self._etag = b"", ""
        self._span = slice(0, 0)

    def operations(self, prefix: str = "") -> tuple[Operation, ...]:
        """Return all that is done; the names begin with ``prefix``."""
        return (
            self.whole(prefix),
            Operation(f"{prefix}qcow2 HEAD", self._head, self._check_head, self._prepare),
            Operation(f"{prefix}qcow2 range", self._get_part, self._check_part, self._prepare),
            Operation(f"{prefix}qcow2 resumed", self._resume, self._check_rest, self._prepare_tag),
        )

    def whole(self, prefix: str = "") -> Operation:
        """Return the first of them: all of the file."""
        return Operation(f"{prefix}qcow2", self._get, self._check_whole, self._prepare)

    def _prepare(self, world: World) -> None:
        self._prepare_image(world)
        if self._world is world:
            return
        answer = self._get(world)
        if answer.status != _OK or answer.cut or disk_of(answer.body) != self._disk:
            raise NotPrepared(f"{answer.status}, or another disk")
        self._world, self._file = world, answer.body
        self._etag = answer.headers.get("etag", "")
        self._span = slice(len(answer.body) // 3, len(answer.body) - 70_000)

    def _prepare_tag(self, world: World) -> None:
        self._prepare(world)
        self._etag = self._etag or world.etag(self._target)

    def _get(self, world: World) -> Answer:
        return world.ask("GET", self._target)

    def _head(self, world: World) -> Answer:
        return world.ask("HEAD", self._target)

    def _get_part(self, world: World) -> Answer:
        part = f"bytes={self._span.start}-{self._span.stop - 1}"
        return world.ask("GET", self._target, headers={"Range": part})

    def _resume(self, world: World) -> Answer:
        rest = {"Range": f"bytes={self._span.start}-", "If-Range": self._etag}
        return world.ask("GET", self._target, headers=rest)

    def _check_whole(self, _world: World, answer: Answer) -> Iterator[str]:
        if answer.status == _OK and self._is_another(answer):
            told = int(answer.headers["content-length"])
            if not answer.cut and (len(answer.body), disk_of(answer.body)) != (told, self._disk):
                yield f"{answer.status} with another disk"
        elif answer.status == _OK:
            yield from _compared(answer, self._file)

    def _check_head(self, _world: World, answer: Answer) -> Iterator[str]:
        if answer.status != _OK or self._is_another(answer):
            return
        if (told := answer.headers.get("content-length")) != str(len(self._file)):
            yield f"a wrong length: {told}"

    def _is_another(self, answer: Answer) -> bool:
        """Tell whether this is the file of a disk of which the file system has told no holes."""
        is_longer = int(answer.headers.get("content-length", 0)) > len(self._file)
        return is_longer and not (self._etag and answer.headers.get("etag") == self._etag)

    def _check_part(self, _world: World, answer: Answer) -> Iterator[str]:
        if answer.status == _OK:
            yield "all of it, where a part was asked for"
        elif answer.status == _PARTIAL:
            yield from self._compared_part(answer, self._span)

    def _check_rest(self, _world: World, answer: Answer) -> Iterator[str]:
        """Where the server cannot say that the file is the same, all of it is sent."""
        if answer.status == _OK:
            yield from _compared(answer, self._file)
        elif answer.status == _PARTIAL:
            yield from self._compared_part(answer, slice(self._span.start, len(self._file)))
            if (etag := answer.headers.get("etag")) != self._etag:
                yield f"resumed, and it is {etag}"

    def _compared_part(self, answer: Answer, span: slice) -> Iterator[str]:
        told = answer.headers.get("content-range")
        if told != f"bytes {span.start}-{span.stop - 1}/{len(self._file)}":
            yield f"a wrong range: {told}"
        yield from _compared(answer, self._file[span])


def _compared(answer: Answer, expected: bytes) -> Iterator[str]:
    if (told := answer.headers.get("content-length")) != str(len(expected)):
        yield f"a wrong length: {told}"
    if answer.cut:
        if not expected.startswith(answer.body):
            yield "wrong bytes before the cut"
        elif len(answer.body) == len(expected):
            yield "all bytes, and then a cut"
    elif answer.body != expected:
        yield f"{answer.status} with {len(answer.body)} wrong bytes"
