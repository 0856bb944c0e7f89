# SPDX-License-Identifier: Apache-2.0
"""Checksums over fake ports: what is taken, opened, answered and given back."""

import hashlib
import json
import threading
from typing import Any

import pytest
from falcon import testing

from imageserver.core.checksums import Recipe
from imageserver.core.errors import BackendError, ClientGone
from imageserver.core.kinds import ImageInfo
from imageserver.web.checksum_resource import encode
from imageserver.web.requests import IS_GONE
from tests.unit.fakes import World
from tests.unit.webapp import Call, app_over, error_of

WHOLE = "/images/t1/checksum?algorithm=whole-sha256"
MIB = 1 << 20


def test_a_checksum_has_lock_and_read_slot_until_it_is_there(
    client: testing.TestClient, world: World
) -> None:
    world.batches = [[(0, 4, False, False), (4, 6, True, False)]]
    result = client.simulate_get(WHOLE)

    expected = hashlib.sha256(b"0123" + bytes(6)).hexdigest()
    assert result.json == {"algorithm": "whole-sha256", "checksum": expected}
    assert world.journal == [
        *("lock", "slot READ alone", "open EXTENTS", "extents 0-10 dirty=False"),
        *("close", "free", "unlock"),
    ]
    assert world.progress[-1] == (10, 10)


def test_the_image_is_read_over_links_that_are_closed_before_its_own(
    client: testing.TestClient, world: World
) -> None:
    world.content, world.piece = bytearray(MIB * 8), MIB
    world.batches = [[(0, MIB * 8, False, False)]]
    both = threading.Barrier(2)

    def meet(at: int) -> None:
        if at < 2 * MIB:  # the first two blocks are under way at the same time
            both.wait(10)

    world.on_piece = meet
    result = client.simulate_get("/images/t1/checksum?block_size=1048576")

    assert result.status_code == 200
    assert "open INSPECT" in world.journal
    assert all(backend.closed for backend in world.opened)
    assert world.journal.index("free") > max(
        at for at, what in enumerate(world.journal) if what == "close"
    )


@pytest.mark.parametrize("has_room", [False, True])
def test_one_link_does_where_there_is_no_second(
    client: testing.TestClient, world: World, has_room: bool
) -> None:
    world.content, world.piece = bytearray(range(256)) * (16 << 10), MIB
    world.batches = [[(0, 4 * MIB, False, False)]]
    world.fail["open INSPECT"] = BackendError("no room")
    if not has_room:
        world.info = ImageInfo(4 * MIB, read_only=False, can_zero=True, can_flush=True)
    result = client.simulate_get("/images/t1/checksum?algorithm=sha256&block_size=1048576")

    part = hashlib.sha256(bytes(range(256)) * (4 << 10)).digest()
    assert result.json["checksum"] == hashlib.sha256(part * 4).hexdigest()
    assert len(world.opened) == 1


def test_what_fails_while_it_is_read_is_an_error(client: testing.TestClient, world: World) -> None:
    def fail(_at: int) -> None:
        raise BackendError("reading failed")

    world.batches, world.on_piece = [[(0, 10, False, False)]], fail

    assert error_of(client.simulate_get(WHOLE)) == (500, "backend error")
    assert world.journal[-4:] == ["stop", "close", "free", "unlock"]


def test_a_file_is_all_data(client: testing.TestClient) -> None:
    result = client.simulate_get("/images/f1/checksum?algorithm=whole-blake2b&start=2&length=3")

    assert result.json["checksum"] == hashlib.blake2b(b"234").hexdigest()


@pytest.mark.parametrize(
    ("query", "status", "message"),
    [
        ("algorithm=none", 400, "unsupported algorithm; supported are "),
        ("algorithm=md5&algorithm=md5", 400, 'invalid "algorithm": there must be one'),
        ("block_size=x", 400, 'invalid "block_size": it must be a number of bytes'),
        ("block_size=4096", 400, 'invalid "block_size": it must be a multiple of 4096 '),
        ("start=-1", 400, 'invalid "start": it must be a number of bytes'),
        ("start=10", 416, "range not satisfiable"),
    ],
)
def test_bad_values_are_refused(
    client: testing.TestClient, query: str, status: int, message: str
) -> None:
    found, told = error_of(client.simulate_get(f"/images/t1/checksum?{query}"))

    assert (found, told[: len(message)]) == (status, message)


def test_the_algorithms_are_listed(client: testing.TestClient, world: World) -> None:
    result = client.simulate_get("/images/t1/checksum/algorithms")

    assert {"blake2b", "sha256", "whole-sha256"} <= set(result.json["algorithms"])
    assert not {"shake_128", "shake_256"} & set(result.json["algorithms"])
    assert "open EXTENTS" not in world.journal


def test_blanks_are_written_while_there_is_nothing_to_tell() -> None:
    clock = iter([0.0, 0.5, 1.0, 1.5, 2.0])
    steps = (step for step in (False, False, False, False, True))
    pieces = list(encode(steps, Recipe("sha256", None), clock=lambda: next(clock, 2.5)))

    assert pieces[:-1] == [b" ", b" "]
    assert json.loads(b"".join(pieces))["block_size"] == 4 * MIB


def test_a_client_that_leaves_ends_the_work(world: World) -> None:
    world.batches = [[(0, 10, True, False)]]
    environ: dict[str, Any] = {IS_GONE: lambda: True}
    with pytest.raises(ClientGone):
        Call(app_over(world), "GET", "/images/t1/checksum", **environ)

    assert world.journal[-4:] == ["stop", "close", "free", "unlock"]
