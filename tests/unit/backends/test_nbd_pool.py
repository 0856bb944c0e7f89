# SPDX-License-Identifier: Apache-2.0
"""Which connections are kept, for whom, and until when: over fake handles, and a clock that is set.

The thread that looks is not started here: a test looks itself.
"""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from imageserver.backends.nbd import connection as module
from imageserver.backends.nbd.kind import NbdImage
from imageserver.backends.nbd.pool import LOOK_SECONDS, MOST_KEPT
from tests.unit.backends.pools import ALLOCATION, DIRTY, IDLE, World, is_closed


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    made = World(tmp_path)
    monkeypatch.setattr(module, "time", made)
    yield made
    made.pool.drain()
    made.pool.look()
    assert all(hold.closed for hold in made.holds)


def test_a_connection_is_used_again_by_one_request_at_a_time(world: World) -> None:
    kept = world.given()

    assert world.take() is kept
    assert world.take() is None
    world.pool.give(kept)
    assert world.take() is kept
    assert len(world.holds) == 1
    kept.close()


@pytest.mark.parametrize(
    ("parts", "transfer"),
    [
        pytest.param({"multi_conn": False}, "x", id="server-has-room-for-one"),
        pytest.param({}, "", id="no-transfer"),
        pytest.param({}, "gone", id="transfer-has-ended"),
    ],
)
def test_what_must_not_be_keptis_closed(
    world: World, parts: dict[str, bool], transfer: str
) -> None:
    kept = world.connected(transfer, **parts)
    world.pool.give(kept)

    assert is_closed(kept)
    assert world.take() is None


def test_a_server_with_room_for_one_is_known_by_its_socket(world: World) -> None:
    server = world.image.stamp()
    assert world.pool.keeps(server)
    world.pool.give(world.connected(multi_conn=False))
    assert not world.pool.keeps(server)
    assert world.pool.keeps(world.bind("s").stamp())


def test_nothing_is_kept_where_that_is_turned_off(world: World) -> None:
    off = World(world.path, idle_seconds=0.0)
    assert not off.pool.keeps(off.image.stamp())
    assert is_closed(off.given())
    assert off.pool.lasts_seconds == 0


def test_an_idle_connection_is_closed_within_the_time_set_and_not_long_before(
    world: World,
) -> None:
    kept = world.given()
    world.pass_by(IDLE - 2 * LOOK_SECONDS - 0.01)
    assert not is_closed(kept)
    world.pass_by(2 * LOOK_SECONDS)
    assert is_closed(kept)
    assert world.take() is None


def test_a_connection_in_use_is_left_alone_and_not_kept_for_ever(world: World) -> None:
    kept = world.given()
    for _ in range(49):
        assert world.take() is kept
        world.pass_by(0.1)
        world.pool.give(kept)
    assert world.take() is kept
    world.pass_by(0.2)
    assert not is_closed(kept)
    world.pool.give(kept)
    assert is_closed(kept)


def test_of_several_of_an_image_one_stays(world: World) -> None:
    several = [world.given() for _ in range(3)]
    world.pass_by(2 * LOOK_SECONDS)

    assert [is_closed(kept) for kept in several] == [True, True, False]
    assert world.take() is several[-1]
    several[-1].close()


def test_images_do_not_share_a_connection(world: World) -> None:
    other_export, other_socket = NbdImage(world.image.socket, "e"), world.bind("t")
    world.transfers |= {"e": other_export, "t": other_socket}
    kept = {each: world.given(each) for each in ("x",)}
    kept |= {"e": world.given("e", other_export), "t": world.given("t", other_socket)}

    for name, image in world.transfers.items():
        assert world.take(image, transfer=name) is kept[name]
        assert world.take(image, transfer=name) is None
        kept[name].close()


def test_a_server_that_took_the_sockets_path_gets_a_connection_of_its_own(world: World) -> None:
    kept = world.given()
    world.bind("s")

    assert world.take() is None
    world.pass_by(2 * LOOK_SECONDS)
    assert is_closed(kept)


def test_a_link_to_the_socket_leads_to_the_same_connection_until_it_is_moved(
    world: World,
) -> None:
    link = world.path / "link"
    link.symlink_to(world.path / "s")
    world.transfers["x"] = image = NbdImage(str(link))
    kept = world.given("x", image)
    assert world.take(image) is kept
    world.pool.give(kept)

    link.unlink()
    link.symlink_to(world.path / "other")
    world.pass_by(2 * LOOK_SECONDS)
    assert is_closed(kept)


@pytest.mark.parametrize("end", ["ends", "names another image"])
def test_a_transfer_that_ends_or_changes_closes_what_is_kept_for_it(world: World, end: str) -> None:
    kept = world.given()
    world.transfers = {} if end == "ends" else {"x": NbdImage(world.image.socket, "e")}
    world.pass_by(2 * LOOK_SECONDS)
    assert is_closed(kept)


def test_a_connection_serves_the_transfer_that_it_was_made_for_and_no_other(world: World) -> None:
    world.transfers["y"] = world.image
    kept = world.given()
    assert world.take(transfer="y") is None
    other = world.given("y")
    assert [is_closed(kept), is_closed(other)] == [True, False]  # one of each image

    assert world.take() is None
    assert world.take(transfer="y") is other
    other.close()


def test_a_connection_of_a_probe_closes_nothing_that_is_kept(world: World) -> None:
    kept, probe = world.given(), world.connected()
    probe.transfer = None
    world.pool.give(probe)

    assert [is_closed(kept), is_closed(probe)] == [False, True]
    kept.close()


def test_a_transfer_that_was_made_again_gets_no_connection_of_the_one_before(world: World) -> None:
    """The look that would close it has not come yet."""
    kept = world.given()

    assert world.take(changed_ns=1) is None
    assert is_closed(kept)


def test_who_has_locked_a_place_gets_no_connection_that_may_lead_elsewhere(world: World) -> None:
    unpinned = world.given()
    assert world.take(world.image.pinned()) is None
    assert is_closed(unpinned)

    pinned = world.given("x", world.image.pinned())
    for image in (world.image.pinned(), world.image):
        assert world.take(image) is pinned
        world.pool.give(pinned)
    pinned.close()


def test_a_hold_lasts_until_the_connectionis_closed(world: World) -> None:
    kept = world.given()
    (hold,) = world.holds
    seen = []
    hold.close = lambda: seen.append("handle" in kept.connection.__dict__)  # type: ignore[method-assign]
    world.pool.drain()
    world.pool.look()
    assert seen == [False]
    hold.closed = True


def test_a_connection_that_broke_while_it_was_idle_is_replaced(world: World) -> None:
    broken, good = world.given(), world.given()
    good, broken = broken, good
    broken.connection.handle.hung_up = True  # type: ignore[attr-defined]

    assert world.take() is good
    assert is_closed(broken)
    good.close()


def test_a_connection_does_for_all_it_was_negotiated_for(world: World) -> None:
    kept = world.given()
    assert world.take(world.image, ALLOCATION) is kept
    world.pool.give(kept)
    assert world.take(world.image, ALLOCATION, DIRTY) is None
    assert is_closed(kept)


def test_nothing_is_kept_where_somebody_waits(world: World) -> None:
    kept, busy = world.given(), world.connected()
    server = kept.connection.server
    world.crowded = {server}
    world.pool.look()
    assert is_closed(kept)
    world.pool.give(busy)
    assert is_closed(busy)

    world.crowded = set()
    world.pool.look()
    again = world.given()
    assert not is_closed(again)
    world.pool.is_waited_for(server)  # one of our own connects, and the kernel does not tell
    world.pool.look()
    assert is_closed(again)


def test_a_server_is_used_as_before_after_somebody_has_waited_there_for_long(
    world: World,
) -> None:
    world.crowded = {world.given().connection.server}
    world.pass_by(1.0)
    world.pass_by(0.01)  # the last look: nothing is kept, and the last use is over a second ago
    world.crowded = set()

    again = world.given()
    assert world.take() is again
    again.close()


def test_a_server_that_turns_us_away_has_no_room_to_spare(world: World) -> None:
    kept = world.given()
    world.pool.is_turned_away(kept.connection.server)
    world.pool.is_turned_away(kept.connection.server)
    world.pool.look()
    assert is_closed(kept)
    assert is_closed(world.given())
    assert world.told == [kept.connection.server]


def test_nothing_is_kept_where_another_process_was_turned_away(world: World) -> None:
    kept = world.given()
    world.told.append(kept.connection.server)
    world.pool.look()
    assert is_closed(kept)
    assert is_closed(world.given())


def test_a_process_that_drains_keeps_nothing(world: World) -> None:
    kept = world.given()
    world.pool.drain()
    world.pool.look()
    assert is_closed(kept)
    assert not world.pool.keeps(world.image.stamp())
    assert is_closed(world.given())


def test_so_many_are_kept_and_no_more(world: World) -> None:
    images = [NbdImage(world.image.socket, str(number)) for number in range(MOST_KEPT + 1)]
    world.transfers |= {image.export: image for image in images}
    kept = [world.given(image.export, image) for image in images]
    assert [is_closed(each) for each in kept] == [False] * MOST_KEPT + [True]


def _lookers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "links"]


def test_a_thread_looks_while_something_is_kept_and_no_longer(world: World) -> None:
    world.pool._looking = None
    world.given()
    (looker,) = _lookers()
    world.seconds += IDLE
    world.pool.drain()
    looker.join(5)
    assert _lookers() == []
    assert all(hold.closed for hold in world.holds)


def test_without_a_thread_nothing_is_kept(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_thread: threading.Thread) -> None:
        raise RuntimeError

    world.pool._looking = None
    monkeypatch.setattr(threading.Thread, "start", start)
    assert is_closed(world.given())
