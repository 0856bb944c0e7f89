# SPDX-License-Identifier: Apache-2.0
"""How many slots one image may have of all that there are, between processes."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from imageserver.core.errors import NoImageSlot, NoSlot
from imageserver.core.ports import Ticket
from imageserver.core.slots import Kind
from imageserver.runtime import slottable
from imageserver.runtime.processes import Life
from imageserver.runtime.slottable import SharedTable
from tests.system.harness import wait_until
from tests.unit.processes import python

PER_IMAGE = {Kind.READ: 2, Kind.WRITE: 2}
#: The image that other processes hold, too.
KEY = "key"
KINDS = pytest.mark.parametrize("kind", PER_IMAGE)

#: Reads the image 100 times; prints how many have, at most, read it at once.
_CONTEND = """
table = slottable.SharedTable(sys.argv[1], {Kind.READ: 99}, per_image={Kind.READ: 2})
print("ready", flush=True)
sys.stdin.readline()
had = most = 0
while had < 100:
    try:
        slot = table.claim(Kind.READ, TICKET)
    except NoSlot:
        os.sched_yield()
        continue
    had += 1
    most = max(most, sum(held.image == "key" for held in table.holders(Kind.READ)))
    time.sleep(0.0002)
    slot.release()
print(most, flush=True)
"""

#: Holds a slot of the kind, with the image, until it is told to let go.
_HOLD = """
limits = dict.fromkeys((Kind.READ, Kind.WRITE), 5)
slot = slottable.SharedTable(sys.argv[1], limits).claim(Kind[sys.argv[2]], TICKET)
print("held", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def table(tmp_path: Path) -> Iterator[SharedTable]:
    limits = {Kind.READ: 5, Kind.WRITE: 5}
    table = SharedTable(str(tmp_path), limits, per_image=PER_IMAGE)
    yield table
    table.close()


def ticket(image: str = KEY) -> Ticket:
    return Ticket("t1", "read", image, "192.0.2.1")


@KINDS
def test_an_image_has_as_many_slots_as_it_may_whatever_others_have(
    table: SharedTable, kind: Kind
) -> None:
    held = [table.claim(kind, ticket(image)) for image in (KEY, "other", KEY)]

    with pytest.raises(NoImageSlot) as raised:
        table.claim(kind, ticket())
    assert raised.value.kind is kind
    table.claim(kind, ticket("other"))
    held[0].release()
    table.claim(kind, ticket())


@KINDS
def test_where_all_slots_are_taken_that_is_what_is_told(table: SharedTable, kind: Kind) -> None:
    for image in ("a", "a", "b", "b", "c"):
        table.claim(kind, ticket(image))

    with pytest.raises(NoSlot) as raised:
        table.claim(kind, ticket())
    assert type(raised.value) is NoSlot
    with pytest.raises(NoImageSlot):
        table.claim(kind, ticket("a"))


def test_readers_and_writers_of_an_image_are_counted_apart(table: SharedTable) -> None:
    for kind in (Kind.READ, Kind.READ, Kind.WRITE, Kind.WRITE, Kind.OTHER, Kind.OTHER, Kind.OTHER):
        table.claim(kind, ticket())


def test_a_reader_that_names_its_image_is_in_nobodys_way(table: SharedTable) -> None:
    table.claim(Kind.READ, ticket()).progress(1, 2)
    writing = table.claim(Kind.WRITE, ticket(), alone=True)
    table.claim(Kind.READ, ticket())

    writing.release()
    table.claim(Kind.OTHER, ticket(), alone=True)


@KINDS
def test_slots_of_a_killed_process_come_back_to_the_image(
    table: SharedTable, tmp_path: Path, kind: Kind
) -> None:
    with contextlib.ExitStack() as stack:
        killed, _ = [stack.enter_context(python(_HOLD, tmp_path, kind.name)) for _ in range(2)]
        wait_until(lambda: table.count(kind) == 2)
        with pytest.raises(NoImageSlot):
            table.claim(kind, ticket())
        killed.kill()
        killed.wait()
        table.claim(kind, ticket())
        with pytest.raises(NoImageSlot):
            table.claim(kind, ticket())


def test_who_dies_is_waited_for_where_that_makes_room_for_the_image(
    table: SharedTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exiting(_: object) -> bool:
        reading.release()
        return True

    monkeypatch.setattr(slottable, "is_exiting", exiting)
    monkeypatch.setattr(SharedTable, "_life", lambda *_: Life.EXITING)
    reading = table.claim(Kind.READ, ticket())
    table.claim(Kind.READ, ticket())

    table.claim(Kind.READ, ticket())


def test_who_dies_with_another_image_is_not_waited_for(
    table: SharedTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(slottable, "is_exiting", asked.append)
    monkeypatch.setattr(SharedTable, "_life", lambda *_: Life.EXITING)
    for image in ("other", KEY, KEY):
        table.claim(Kind.READ, ticket(image))

    with pytest.raises(NoImageSlot):
        table.claim(Kind.READ, ticket())
    assert len(asked) == 2  # who has the image


def test_nobody_looks_again_for_the_dead_where_the_living_were_quicker(
    table: SharedTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    lives = [Life.EXITING, Life.LIVING]
    looks: list[bool] = []

    def sweep(_table: SharedTable) -> int:
        looks.append(True)
        return 1

    monkeypatch.setattr(SharedTable, "_life", lambda *_: lives[len(looks)])
    monkeypatch.setattr(SharedTable, "sweep", sweep)
    for _ in range(2):
        table.claim(Kind.READ, ticket())

    with pytest.raises(NoImageSlot):
        table.claim(Kind.READ, ticket())
    assert looks == [True]


@KINDS
def test_nobody_looks_for_the_dead_where_the_living_have_all_that_the_image_may_have(
    table: SharedTable, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    monkeypatch.delattr(SharedTable, "sweep")
    monkeypatch.delattr(slottable, "life_of")  # this process lives
    for image in (KEY, "other", KEY):
        table.claim(kind, ticket(image))

    with pytest.raises(NoImageSlot):
        table.claim(kind, ticket())


def test_processes_that_contend_for_an_image_never_exceed_its_limit(tmp_path: Path) -> None:
    contenders = [python(_CONTEND, tmp_path) for _ in range(3)]
    for each in contenders:
        assert each.stdout is not None
        assert each.stdout.readline() == "ready\n"
    for each in contenders:
        assert each.stdin is not None
        each.stdin.write("\n")
        each.stdin.flush()
    found = [int(each.communicate(timeout=60)[0]) for each in contenders]

    assert max(found) == 2
