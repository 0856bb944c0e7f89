# SPDX-License-Identifier: Apache-2.0
"""A slot table that is found: used, replaced, refused, or mended."""

import contextlib
import fcntl
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from imageserver.core import slots
from imageserver.core.errors import NoSlot, StateUnavailable
from imageserver.core.slots import IncompatibleTable, Kind
from imageserver.runtime import slottable, tablefile
from imageserver.runtime.directory import RuntimeDirectory
from imageserver.runtime.private import open_private
from imageserver.runtime.processes import boot_id, namespace, owner_of
from imageserver.runtime.slottable import SharedTable
from tests.unit.processes import LIMITS, TICKET, holder, python
from tests.unit.shortages import open_descriptors


@pytest.fixture
def table(tmp_path: Path) -> Iterator[SharedTable]:
    table = SharedTable(str(tmp_path), LIMITS)
    yield table
    table.close()


def test_what_was_held_is_still_held_after_reopening(tmp_path: Path, table: SharedTable) -> None:
    table.claim(Kind.WRITE, TICKET)
    table.close()

    with pytest.raises(NoSlot):
        SharedTable(str(tmp_path), LIMITS).claim(Kind.WRITE, TICKET)


def _strangers(boot: bytes, version: int, where: int = namespace()) -> bytes:
    """Return a whole table of another boot, version or namespace, with a reader."""
    buffer = bytearray(slots.SIZE)
    slots.format_table(memoryview(buffer), boot, where, 0)
    owner = owner_of(os.getpid())
    assert owner is not None
    slots.SlotTable(memoryview(buffer), boot, where).claim(slots.Holder(Kind.READ, owner), 1)
    buffer[8:12] = version.to_bytes(4, sys.byteorder)
    return bytes(buffer)


FOUND = [
    pytest.param(lambda: _strangers(boot_id(), slots.VERSION + 1), id="other-version"),
    pytest.param(lambda: _strangers(bytes(16), slots.VERSION), id="other-boot"),
    pytest.param(lambda: _strangers(boot_id(), slots.VERSION, 7), id="other-namespace"),
    pytest.param(lambda: b"#!/bin/sh\n", id="something-else"),
    pytest.param(lambda: bytes(slots.SIZE), id="zeros"),
    pytest.param(lambda: bytes(slots.SIZE * 2), id="too-long"),
]


@pytest.mark.parametrize("found", [*FOUND, pytest.param(lambda: b"", id="nothing")])
def test_a_table_nobody_uses_and_nobody_can_read_is_replaced(
    tmp_path: Path, table: SharedTable, found: object
) -> None:
    (tmp_path / "slots").write_bytes(found())  # type: ignore[operator]

    table.open()

    assert [table.count(kind) for kind in Kind] == [0] * len(Kind)
    assert (tmp_path / "slots").stat().st_size == slots.SIZE
    deaths = table.claim(Kind.READ, TICKET).deaths
    assert deaths.first != deaths.count  # those who had records in the old one may have died


def test_in_a_new_table_nobody_has_died(table: SharedTable) -> None:
    deaths = table.claim(Kind.READ, TICKET).deaths

    assert deaths.first == deaths.count != 0


_USED = r"(still runs|in another PID namespace .*); stop it first, or choose another"


@pytest.mark.parametrize("found", FOUND[:3])
def test_a_strangers_table_in_use_is_refused_and_left_alone(
    tmp_path: Path, table: SharedTable, monkeypatch: pytest.MonkeyPatch, found: object
) -> None:
    monkeypatch.setattr(tablefile, "_MEND_SECONDS", 0)
    text = found()  # type: ignore[operator]
    (tmp_path / "slots").write_bytes(text)
    user = open_private(str(tmp_path), "slots.use")
    fcntl.flock(user, fcntl.LOCK_SH)
    before = open_descriptors()

    with pytest.raises(IncompatibleTable, match=_USED):
        tablefile.examine(str(tmp_path))
    with pytest.raises(IncompatibleTable, match=_USED):
        table.open()

    assert (tmp_path / "slots").read_bytes() == text
    table.close()
    assert open_descriptors() == before
    os.close(user)
    table.open()


@pytest.mark.parametrize("removed", [["slots"], ["slots", "slots.use"]], ids=["table", "all"])
def test_a_table_removed_under_a_server_is_neither_used_nor_made_again(
    tmp_path: Path, table: SharedTable, monkeypatch: pytest.MonkeyPatch, removed: list[str]
) -> None:
    monkeypatch.setattr(tablefile, "_MEND_SECONDS", 0)
    worker = table.claim(Kind.WORKER, TICKET)
    for name in removed:
        (tmp_path / name).unlink()
    newcomer = SharedTable(str(tmp_path), LIMITS)

    with pytest.raises(StateUnavailable, match=r"slot table in .* was removed or replaced"):
        table.claim(Kind.READ, TICKET)
    with pytest.raises(IncompatibleTable, match="removed under a server that still runs"):
        newcomer.open()
    with pytest.raises(IncompatibleTable, match="removed under a server that still runs"):
        tablefile.examine(str(tmp_path))

    assert not (tmp_path / "slots").exists()
    worker.release()  # what is held is given back as ever
    assert table.claim(Kind.WORKER, TICKET)
    newcomer.close()
    table.close()
    newcomer.open()


def test_a_table_put_back_in_its_place_is_used_again(tmp_path: Path, table: SharedTable) -> None:
    table.open()
    (tmp_path / "slots").rename(tmp_path / "away")
    (tmp_path / "slots").write_bytes((tmp_path / "away").read_bytes())
    with pytest.raises(StateUnavailable):
        table.claim(Kind.READ, TICKET)
    (tmp_path / "away").rename(tmp_path / "slots")

    table.claim(Kind.READ, TICKET).release()


def test_a_child_has_its_parents_table_whatever_has_become_of_its_name(tmp_path: Path) -> None:
    script = """
table.open()
for name in ("slots", "slots.use"):
    os.unlink(os.path.join(sys.argv[1], name))
child = os.fork()
if child == 0:
    slot = table.claim(Kind.WORKER, TICKET)
    os._exit(0)
os.waitpid(child, 0)
print([row.owner.pid == child for row in table.holders(Kind.WORKER)], os.listdir(sys.argv[1]))
"""
    out, _ = python(script, tmp_path).communicate(timeout=30)

    assert out == "[True] []\n"


def test_a_child_mends_the_header_of_its_parents_table(tmp_path: Path) -> None:
    script = """
table.open()
with open(os.path.join(sys.argv[1], "slots"), "r+b") as file:
    file.write(bytes(64))
child = os.fork()
if child == 0:
    table.claim(Kind.WORKER, TICKET)
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    out, _ = python(script, tmp_path).communicate(timeout=30)

    assert out == "0\n"


def test_a_table_in_use_by_our_like_is_shared(tmp_path: Path, table: SharedTable) -> None:
    with holder(tmp_path, Kind.READ):
        table.open()

        assert table.count(Kind.READ) == 1


def test_closing_leaves_no_descriptor_open(table: SharedTable) -> None:
    before = open_descriptors()

    table.claim(Kind.READ, TICKET)
    table.close()
    table.close()

    assert open_descriptors() == before


def test_a_directory_that_is_lent_stays_open(tmp_path: Path) -> None:
    with contextlib.closing(RuntimeDirectory(str(tmp_path))) as runtime:
        table = SharedTable(runtime, LIMITS)
        table.claim(Kind.WRITE, TICKET)
        table.close()

        (tmp_path / "slots").unlink()
        assert SharedTable(runtime, LIMITS).count(Kind.WRITE) == 1  # by its descriptor


def test_what_one_process_has_said_no_other_says_again(tmp_path: Path, table: SharedTable) -> None:
    script = 'print(table.is_first("here"), table.is_first("there"))'
    out, _ = python(script, tmp_path).communicate(timeout=30)

    assert out == "True True\n"
    told = ("here", "there", "\udcff", "\udcff")
    assert [table.is_first(text) for text in told] == [False, False, True, False]


# What is damaged


def _cut_short(path: Path) -> None:
    os.truncate(path, slots.SIZE - 1)


def _damage(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(bytes(64))


def _replace(path: Path) -> None:
    (path.parent / "new").write_bytes(path.read_bytes())
    (path.parent / "new").rename(path)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        pytest.param(os.unlink, "the file slots in {} is another, or gone", id="gone"),
        pytest.param(_replace, "the file slots in {} is another, or gone", id="another"),
        pytest.param(_cut_short, "the file slots in {} was cut short", id="short"),
        pytest.param(_damage, "its header is damaged", id="damaged"),
    ],
)
def test_a_table_is_proved_until_it_is_harmed(
    tmp_path: Path, table: SharedTable, harm: Callable[[Path], None], said: str
) -> None:
    table.prove()
    assert table.holders(*Kind) == []

    harm(tmp_path / "slots")
    with pytest.raises(IncompatibleTable) as raised:
        table.prove()
    assert str(raised.value) == said.format(tmp_path)


def test_a_full_table_proves_nothing(table: SharedTable) -> None:
    nobodys = TICKET._replace(image="")
    held = [table.claim(Kind.OTHER, nobodys) for _ in range(slots.CAPACITY)]
    with pytest.raises(NoSlot):
        table.prove()
    held[0].release()
    table.prove()


def test_a_damaged_header_is_mended_by_who_uses_the_table(
    tmp_path: Path, table: SharedTable, caplog: pytest.LogCaptureFixture
) -> None:
    table.claim(Kind.READ, TICKET)
    whole = (tmp_path / "slots").read_bytes()
    with open(tmp_path / "slots", "r+b") as file:
        file.write(bytes(64))
    table.mend()
    table.mend()

    mended = (tmp_path / "slots").read_bytes()
    assert (mended[:48], mended[64:]) == (whole[:48], whole[64:])
    first, deaths = memoryview(mended)[48:64].cast("Q")
    assert first != deaths  # somebody may have died unseen
    assert deaths not in {0, *memoryview(whole)[48:64].cast("Q")}
    assert [record.getMessage() for record in caplog.records] == [
        "slot table: a damaged header was mended"
    ]


def test_who_finds_a_damaged_header_waits_for_it_to_be_mended(
    tmp_path: Path, table: SharedTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    table.claim(Kind.READ, TICKET)
    with open(tmp_path / "slots", "r+b") as file:
        file.write(bytes(64))
    monkeypatch.setattr(slottable.time, "sleep", lambda _: table.mend())
    newcomer = SharedTable(str(tmp_path), LIMITS)

    assert newcomer.count(Kind.READ) == 1
    newcomer.close()


def test_who_examines_a_damaged_header_waits_for_it_to_be_mended(
    tmp_path: Path, table: SharedTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    table.claim(Kind.READ, TICKET)
    with open(tmp_path / "slots", "r+b") as file:
        file.write(bytes(64))
    waits: list[float] = []

    def mend(seconds: float) -> None:
        waits.append(seconds)
        table.mend()

    monkeypatch.setattr(tablefile.time, "sleep", mend)
    tablefile.examine(str(tmp_path))

    assert len(waits) == 1
