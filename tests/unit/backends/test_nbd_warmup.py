# SPDX-License-Identifier: Apache-2.0
"""The one larger read of each server that is new, over a fake link."""

import pytest

from imageserver.backends.nbd import warmup
from imageserver.backends.nbd.failures import Stopped
from imageserver.backends.nbd.warmup import WarmUp
from imageserver.core.errors import BackendError, BackendTimeout, ClientGone, NoSpace
from tests.unit.backends.links import FakeLink

KIB, MIB = 1 << 10, 1 << 20
SIZE = 8 * MIB


def _fake(server: int = 1, **parts: object) -> FakeLink:
    defaults = {"chunk": MIB, "server": (server,)}
    return FakeLink(bytearray(SIZE), **(defaults | parts))  # type: ignore[arg-type]


def test_each_server_is_read_once_near_what_is_wanted() -> None:
    warm_up, first, again, other = WarmUp(), _fake(), _fake(), _fake(2)
    warm_up.read_once(first.link, 3 * MIB, MIB)
    warm_up.read_once(again.link, 0, MIB)
    warm_up.read_once(other.link, SIZE - MIB, MIB)

    assert first.sent("read") == [(3 * MIB, 2 * MIB)]
    assert again.requests == []
    assert other.sent("read") == [(SIZE - 2 * MIB, 2 * MIB)]


@pytest.mark.parametrize(
    ("fake", "length"),
    [
        pytest.param(_fake(), 128 * KIB, id="small"),
        pytest.param(_fake(size=MIB), MIB, id="no-more-than-a-request"),
        pytest.param(_fake(maximum=MIB), MIB, id="server-takes-no-larger-one"),
    ],
)
def test_what_needs_no_large_request_causes_none(fake: FakeLink, length: int) -> None:
    WarmUp().read_once(fake.link, 0, length)
    assert fake.requests == []


def test_a_read_is_of_whole_blocks() -> None:
    fake = _fake(align=4096, size=3 * MIB + 512)  # the fake refuses others
    WarmUp().read_once(fake.link, 2 * MIB + 5, MIB)
    assert fake.sent("read") == [(MIB, 2 * MIB)]


@pytest.mark.parametrize("error", [BackendError("bad"), NoSpace("odd")], ids=repr)
def test_a_read_that_fails_says_nothing(error: Exception) -> None:
    warm_up, fake = WarmUp(), _fake(fail=lambda _: error)
    warm_up.read_once(fake.link, 0, MIB)
    warm_up.read_once(fake.link, 0, MIB)
    assert len(fake.requests) == 1


@pytest.mark.parametrize("error", [BackendTimeout("s"), ClientGone(), Stopped("s")], ids=repr)
def test_a_read_that_nobody_waits_for_any_more_ends_the_transfer(error: Exception) -> None:
    with pytest.raises(type(error)):
        WarmUp().read_once(_fake(fail=lambda _: error).link, 0, MIB)


def test_only_so_many_servers_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warmup, "_MOST", 2)
    warm_up = WarmUp()
    for server in (1, 2, 3, 1):
        fake = _fake(server)
        warm_up.read_once(fake.link, 0, MIB)
        assert len(fake.requests) == 1
