# SPDX-License-Identifier: Apache-2.0
"""Zeroing over a fake link and a clock that is set: which steps, and what becomes of edges."""

import itertools

import pytest

from imageserver.backends.nbd import zeroing
from imageserver.backends.nbd.failures import NotSupported
from imageserver.core.errors import NoSpace
from tests.unit.backends.links import KIB, FakeLink, Request, at

SIZE = 64 * KIB
MIB, GIB = 1 << 20, 1 << 30


class _Clock:
    """Seconds that pass only while a request is waited for."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    made = _Clock()
    monkeypatch.setattr(zeroing, "time", made)
    return made


def _large(size: int, **parts: object) -> FakeLink:
    """Return an export of which no byte is looked at."""
    return FakeLink(bytearray(), size=size, **parts)  # type: ignore[arg-type]


@pytest.mark.parametrize("span", [(0, SIZE), (5, 3), (511, 2), (100, 5000), (512, 1024)], ids=str)
@pytest.mark.parametrize("can_zero", [True, False], ids=["write-zeroes", "no-write-zeroes"])
@pytest.mark.parametrize("align", [1, 512])
def test_a_range_is_zero_and_nothing_else(
    span: tuple[int, int], can_zero: bool, align: int
) -> None:
    start, length = span
    fake = FakeLink(bytearray(b"x" * SIZE), align=align, can_zero=can_zero)

    totals = list(zeroing.zero(fake.link, start, length))

    assert fake.content == b"x" * start + bytes(length) + b"x" * (SIZE - start - length)
    assert totals == sorted(totals)
    assert (totals[-1], fake.settled) == (length, True)


def test_edges_are_written_and_whole_blocks_zeroed() -> None:
    fake = FakeLink(bytearray(b"x" * SIZE), align=512)
    list(zeroing.zero(fake.link, 1000, 5000))

    assert fake.sent("write") == [(512, 512), (5632, 512)]
    assert fake.sent("zero") == [(1024, 4608)]


def test_a_range_within_a_block_is_written() -> None:
    fake = FakeLink(bytearray(b"x" * SIZE), align=4096)
    list(zeroing.zero(fake.link, 4100, 4000))

    assert (fake.sent("write"), fake.sent("zero")) == ([(4096, 4096)], [])


def test_a_server_that_zeroes_fast_gets_the_largest_steps() -> None:
    fake = _large(5 * GIB, fast_zero=True)

    assert list(zeroing.zero(fake.link, 0, fake.size))[-1] == fake.size
    assert fake.sent("fast zero") == [(0, 2 * GIB), (2 * GIB, 2 * GIB), (4 * GIB, GIB)]
    assert fake.sent("zero") == []


@pytest.mark.parametrize("refused_at", [0, 2 * GIB], ids=["at-once", "later"])
def test_a_server_that_refuses_to_zero_fast_gets_slower_steps_from_there(refused_at: int) -> None:
    def refuse(request: Request) -> BaseException | None:
        is_refused = request.command == "fast zero" and request.start >= refused_at
        return NotSupported("no") if is_refused else None

    fake = _large(4 * GIB, fast_zero=True, fail=refuse)

    assert list(zeroing.zero(fake.link, 0, fake.size))[-1] == fake.size
    slow = fake.sent("zero")
    assert slow[0] == (refused_at, 64 * MIB)
    assert sum(length for _, length in slow) == fake.size - refused_at


def test_steps_grow_while_they_are_quick(clock: _Clock) -> None:
    fake = _large(16 * GIB)
    list(zeroing.zero(fake.link, 0, fake.size))

    steps = [length // MIB for _, length in fake.sent("zero")]
    assert steps[:3] == [64] * 3  # in flight before one is done
    assert max(steps) == 2048
    assert sum(steps) == 16 * 1024
    assert all(start % length == 0 for start, length in fake.sent("zero")[-3:])


def test_steps_shrink_to_a_mib_while_they_are_slow(clock: _Clock) -> None:
    def pass_by(_: Request) -> None:
        clock.seconds += 2

    fake = _large(512 * MIB, on_wait=pass_by)
    list(zeroing.zero(fake.link, 0, fake.size))

    steps = [length // MIB for _, length in fake.sent("zero")]
    assert steps[:9] == [64, 64, 64, 32, 16, 8, 4, 2, 1]
    assert (set(steps[9:]), sum(steps)) == ({1}, 512)


def test_steps_stay_while_they_are_neither(clock: _Clock) -> None:
    def pass_by(_: Request) -> None:
        clock.seconds += 0.2  # three in flight: each takes 0.6 s

    fake = _large(GIB, on_wait=pass_by)
    list(zeroing.zero(fake.link, 0, fake.size))

    assert {length for _, length in fake.sent("zero")[3:]} <= {64 * MIB, 128 * MIB}
    assert fake.most_in_flight == fake.depth


@pytest.mark.parametrize("command", ["fast zero", "zero"])
def test_a_zero_that_fails_is_an_error_and_leaves_nothing_in_flight(command: str) -> None:
    fake = _large(
        4 * GIB,
        fast_zero=command == "fast zero",
        fail=lambda r: NoSpace("full") if at(command, 0)(r) else None,
    )
    with pytest.raises(NoSpace):
        list(zeroing.zero(fake.link, 0, fake.size))

    assert (fake.settled, fake.settles) == (True, 1)
    assert {request.command for request in fake.requests} == {command}


def test_whoever_drops_a_zero_waits_for_what_is_in_flight_only() -> None:
    fake = _large(16 * GIB)
    zeroes = zeroing.zero(fake.link, 0, fake.size)
    list(itertools.islice(zeroes, 2))
    zeroes.close()  # type: ignore[attr-defined]

    assert (fake.settles, len(fake.requests)) == (1, fake.depth + 1)


@pytest.mark.parametrize("fast_zero", [True, False])
def test_what_is_to_stay_allocated_is_zeroed_without_holes_in_fast_and_slow_steps(
    fast_zero: bool,
) -> None:
    def refuse(request: Request) -> BaseException | None:
        is_refused = request.command.startswith("fast") and request.start >= 2 * GIB
        return NotSupported("no") if is_refused else None

    fake = _large(4 * GIB, fast_zero=fast_zero, fail=refuse)
    list(zeroing.zero(fake.link, 0, fake.size, hole=False))

    assert {request.command for request in fake.requests} == (
        {"fast zero without holes", "zero without holes"} if fast_zero else {"zero without holes"}
    )
