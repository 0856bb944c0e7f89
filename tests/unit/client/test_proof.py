# SPDX-License-Identifier: Apache-2.0
"""An image on a server against the one here: any byte that differs is found and named."""

import hashlib
from collections.abc import Iterator

import pytest

from imageserver.client.backoff import RetryBudget
from imageserver.client.failures import Broken, Different
from imageserver.client.moving import proof
from imageserver.client.moving.blocks import local_part
from imageserver.client.moving.proof import Proof
from imageserver.client.plan import MIB, Range, Spans
from imageserver.core.checksums import Recipe

SIZE = 9 * MIB + 77
DATA = bytearray(SIZE)
HELD = Spans([(5, 2 * MIB), (3 * MIB + 9, 3 * MIB + 10), (8 * MIB, SIZE)])
for _start, _stop in HELD:
    DATA[_start:_stop] = hashlib.shake_128(b"data").digest(_stop - _start)
ALL = Spans([(0, SIZE)])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "recipe", lambda: Recipe("sha256", MIB))
    monkeypatch.setattr(proof, "_SPAN_BYTES", 2 * MIB)


class _Server:
    """A ``Remote`` with the same image, but for one byte."""

    def __init__(self, damaged: int | None = None) -> None:
        self.data = bytearray(DATA)
        if damaged is not None:
            self.data[damaged] ^= 1
        self.asked: list[Range | None] = []
        self.breaks = 0

    def checksum(self, algorithm: str, block_size: int, span: Range | None) -> str:
        self.asked.append(span)
        if self.breaks:
            self.breaks -= 1
            raise Broken("cut")
        start, stop = span or (0, SIZE)
        outer = hashlib.new(algorithm)
        for at in range(start, stop, block_size):
            block = self.data[at : min(at + block_size, stop)]
            outer.update(hashlib.new(algorithm, block).digest())
        return outer.hexdigest()

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        for at in range(start, stop, MIB):
            yield bytes(self.data[at : min(at + MIB, stop)])

    def cut(self) -> None:
        """Nothing is under way."""


def read(start: int, length: int) -> bytes:
    return bytes(DATA[start : start + length])


def compared(server: _Server, where: Spans = ALL, *, has_spans: bool = True) -> int:
    """Compare; return the bytes of data that were told."""
    told: list[int] = []
    made = Proof(server, HELD, SIZE, RetryBudget(60), has_spans=has_spans)  # type: ignore[arg-type]
    made.compare(where, local_part(read, proof.recipe()), read, told.append)
    return sum(told)


def test_the_same_is_found_the_same_and_each_byte_of_data_is_told_once() -> None:
    server = _Server()
    assert compared(server) == HELD.total
    assert Spans(span for span in server.asked if span).gaps(SIZE).total == 0
    assert len(server.asked) == 2


@pytest.mark.parametrize("damaged", [0, 5, MIB, 2 * MIB, 3 * MIB + 9, 7 * MIB, 8 * MIB, SIZE - 1])
def test_a_byte_that_differs_is_found_in_data_and_in_holes(damaged: int) -> None:
    start = damaged // MIB * MIB
    name = f"^bytes {start}-{min(start + MIB, SIZE) - 1} differ$"
    with pytest.raises(Different, match=name):
        compared(_Server(damaged))


def test_only_what_is_asked_for_is_compared() -> None:
    assert compared(_Server(damaged=MIB), Spans([(0, MIB), (8 * MIB, SIZE)])) > 0


def test_a_server_of_whole_checksums_is_read_to_find_the_difference() -> None:
    server = _Server()
    compared(server, has_spans=False)
    assert server.asked == [None]
    with pytest.raises(Different, match="differ"):
        compared(_Server(damaged=8 * MIB), has_spans=False)


def test_a_checksum_of_other_bytes_than_are_served_is_told() -> None:
    server = _Server(damaged=5)
    server.read = lambda start, stop: iter([read(start, stop - start)])  # type: ignore[method-assign]
    with pytest.raises(Different, match="of other bytes than it serves"):
        compared(server, has_spans=False)


def test_a_difference_that_goes_away_is_one_all_the_same() -> None:
    class _Recovering(_Server):
        def checksum(self, algorithm: str, block_size: int, span: Range | None) -> str:
            found = super().checksum(algorithm, block_size, span)
            self.data[:] = DATA
            return found

    with pytest.raises(Different, match="is not always the same"):
        compared(_Recovering(damaged=5))


def test_an_answer_that_breaks_off_is_asked_for_again() -> None:
    server = _Server()
    server.breaks = 1
    compared(server)
