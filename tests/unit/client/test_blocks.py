# SPDX-License-Identifier: Apache-2.0
"""Parts of a checksum by several threads: the same hex as by one, of data alone."""

import hashlib
import threading
import time

import pytest

from imageserver.client.backoff import RetryBudget
from imageserver.client.failures import Broken, Busy, ClientError
from imageserver.client.moving.blocks import RemoteParts, add, local_part, parts
from imageserver.client.plan import MIB, Spans
from imageserver.core.checksums import Recipe

SIZE = 9 * MIB + 77
DATA = bytearray(SIZE)
HELD = Spans([(5, MIB), (3 * MIB + 9, 3 * MIB + 10), (8 * MIB, SIZE)])
for _start, _stop in HELD:
    DATA[_start:_stop] = hashlib.shake_128(b"data").digest(_stop - _start)


class _Image:
    """A ``LocalImage``, and a ``Remote`` of which each first request breaks."""

    def __init__(self) -> None:
        self.reads: list[tuple[int, int]] = []
        self.breaks = False

    def read(self, start: int, length: int) -> bytes:
        self.reads.append((start, start + length))
        return bytes(DATA[start : start + length])

    def cut(self) -> None:
        self.breaks = True


class _Breaking(_Image):
    def read(self, start: int, stop: int):  # type: ignore[override]
        first = (start, stop) not in self.reads
        self.reads.append((start, stop))
        for at in range(start, stop, MIB):
            yield bytearray(DATA[at : min(at + MIB, stop)])
            if first:
                raise Broken("cut")


def expected(start: int, stop: int, size: int = MIB) -> str:
    outer = hashlib.sha256()
    for at in range(start, stop, size):
        outer.update(hashlib.sha256(DATA[at : min(at + size, stop)]).digest())
    return outer.hexdigest()


def computed(recipe: Recipe, part, span=(0, SIZE)) -> str:
    for found in parts(recipe, HELD, span, part, threads=2):
        add(recipe, found)
    return str(recipe.answer()["checksum"])


@pytest.mark.parametrize("span", [(0, SIZE), (2 * MIB, 9 * MIB), (7, 8), (0, 0)], ids=str)
def test_block_hashes_of_any_span_are_those_of_one_thread(span: tuple[int, int]) -> None:
    recipe = Recipe("sha256", MIB)
    assert computed(recipe, local_part(_Image().read, recipe), span) == expected(*span)


def test_whole_checksums_are_those_of_all_bytes() -> None:
    recipe = Recipe("whole-sha256", None)
    part = local_part(_Image().read, recipe)
    assert computed(recipe, part) == hashlib.sha256(DATA).hexdigest()


def test_what_is_no_data_is_not_read() -> None:
    image, recipe = _Image(), Recipe("sha256", MIB)
    computed(recipe, local_part(image.read, recipe))
    assert Spans(sorted(image.reads)).without(HELD).total == 0


def test_an_answer_that_breaks_off_is_asked_for_again() -> None:
    image, recipe = _Breaking(), Recipe("sha256", MIB)
    reader = RemoteParts(image, recipe, RetryBudget(60))  # type: ignore[arg-type]
    assert computed(recipe, reader.part) == expected(0, SIZE)


def test_a_thread_that_waits_for_the_server_ends_with_the_checksum() -> None:
    class _Full(_Image):
        def read(self, start: int, stop: int):  # type: ignore[override]
            raise Busy("busy", 30)

    recipe = Recipe("sha256", MIB)
    reader = RemoteParts(_Full(), recipe, RetryBudget(60))  # type: ignore[arg-type]
    found = parts(recipe, HELD, (0, SIZE), reader.part, threads=1)
    threading.Timer(0.1, reader.end).start()
    began = time.monotonic()
    with pytest.raises(ClientError, match="given up"):
        next(found)

    assert time.monotonic() - began < 10


def test_threads_of_a_checksum_that_is_given_up_end() -> None:
    image, recipe = _Breaking(), Recipe("sha256", MIB)
    reader = RemoteParts(image, recipe, RetryBudget(60))  # type: ignore[arg-type]
    found = parts(recipe, HELD, (0, SIZE), reader.part, threads=2)
    next(found)
    reader.end()
    with pytest.raises(ClientError, match="given up"):
        for _ in found:
            pass
    hashing = [thread for thread in threading.enumerate() if thread.name.startswith("hash")]
    for thread in hashing:
        thread.join(5)
    assert (any(thread.is_alive() for thread in hashing), image.breaks) == (False, True)
