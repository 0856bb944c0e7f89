# SPDX-License-Identifier: Apache-2.0
"""OPTIONS and HEAD: what an image can do, and what is said of one that cannot be asked."""

import json
from types import SimpleNamespace

import pytest
from falcon import testing

from imageserver.core.errors import BackendError
from imageserver.core.kinds import ImageInfo
from imageserver.images.probing import Asking, WouldWait
from imageserver.web.body import ASKING
from imageserver.web.image_resource import Limits
from tests.unit.fakes import World
from tests.unit.webapp import COMMON, JSON, Call, app_over


@pytest.mark.parametrize(
    ("path", "info", "features", "writers", "methods"),
    [
        pytest.param(
            "t1",
            None,
            ["extents", "zero", "flush", "digest", "checksum", "qcow2"],
            1,
            "PUT, PATCH",
            id="nbd",
        ),
        pytest.param(
            "t1",
            (False, False),
            ["extents", "digest", "checksum", "qcow2"],
            1,
            "PUT, PATCH",
            id="nbd-without-either",
        ),
        pytest.param("ro", None, ["extents", "checksum", "qcow2"], 0, "", id="read-only-transfer"),
        pytest.param("f1", None, ["flush", "digest", "checksum"], 1, "PUT, POST", id="file"),
    ],
)
def test_options_say_what_an_image_can_do(
    world: World,
    client: testing.TestClient,
    path: str,
    info: tuple[bool, bool] | None,
    features: list[str],
    writers: int,
    methods: str,
) -> None:
    if info:
        world.info = ImageInfo(10, read_only=False, can_zero=info[0], can_flush=info[1])
    result = client.simulate_options(f"/images/{path}")

    announced = ", ".join(filter(None, ["GET", methods, "OPTIONS"]))
    assert result.json == {
        "unix_socket": None,
        "features": features,
        "max_readers": 8,
        "max_writers": writers,
    }
    assert result.headers == COMMON | JSON | {
        "content-length": str(len(result.content)),
        "allow": announced.replace("GET", "GET, HEAD"),
        "access-control-allow-methods": announced,
    }


@pytest.mark.parametrize("multi_conn", [False, True])
def test_options_offer_several_writers_where_the_export_bears_them(
    world: World, multi_conn: bool
) -> None:
    world.info = ImageInfo(
        10, read_only=False, can_zero=True, can_flush=True, multi_conn=multi_conn
    )
    limits = Limits(max_readers=8, max_writers=4, unix_socket=None)
    client = testing.TestClient(app_over(world, limits=limits))

    answer = client.simulate_options("/images/t1").json

    assert answer["max_writers"] == (4 if multi_conn else 1)


@pytest.mark.parametrize("method", ["OPTIONS", "HEAD"])
def test_a_probe_that_would_wait_is_passed_back_as_if_it_had_not_come(
    world: World, method: str
) -> None:
    told: list[object] = []
    journal = SimpleNamespace(finished=told.append)
    with pytest.raises(WouldWait):
        Call(app_over(world, journal), method, "/images/ex", **{ASKING: Asking.ELSEWHERE})

    assert (world.journal, told) == (["visit", "leave"], [])


@pytest.mark.parametrize("asking", [Asking.ELSEWHERE, Asking.NEVER])
@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("OPTIONS", "/images/*", 200),
        ("OPTIONS", "/images/f1", 200),
        ("HEAD", "/images/f1", 200),
        ("OPTIONS", "/images/unknown", 404),
        ("HEAD", "/images/unknown", 404),
    ],
)
def test_what_needs_no_back_end_is_answered_by_any_thread(
    method: str, path: str, status: int, asking: Asking
) -> None:
    assert Call(app_over(World()), method, path, **{ASKING: asking}).status == status


def test_options_that_nobody_can_ask_for_come_from_the_configuration(world: World) -> None:
    call = Call(app_over(world), "OPTIONS", "/images/t1", **{ASKING: Asking.NEVER})

    assert call.status == 200
    assert json.loads(call.read())["features"] == [
        "extents",
        "zero",
        "flush",
        "digest",
        "checksum",
        "qcow2",
    ]
    assert world.opened == []


def test_a_size_that_nobody_can_ask_for_is_503(world: World) -> None:
    call = Call(app_over(world), "HEAD", "/images/t1", **{ASKING: Asking.NEVER})

    assert (call.status, call.headers["retry-after"], world.opened) == (503, "1", [])


def test_options_of_a_server_that_is_away_come_from_the_configuration(
    client: testing.TestClient, world: World
) -> None:
    world.fail["open INSPECT"] = BackendError("refused")

    result = client.simulate_options("/images/t1")

    assert (result.status_code, result.json["features"]) == (
        200,
        ["extents", "zero", "flush", "digest", "checksum", "qcow2"],
    )
