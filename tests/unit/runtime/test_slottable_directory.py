# SPDX-License-Identifier: Apache-2.0
"""The runtime directory: ours alone, or not used; and a table that is found in it."""

import errno
import fcntl
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from imageserver.core import slots
from imageserver.core.errors import NoSlot, StateUnavailable
from imageserver.core.slots import IncompatibleTable, Kind
from imageserver.runtime import slottable, tablefile
from imageserver.runtime.private import (
    UnusableDirectory,
    examine_runtime,
    open_private,
    prepare_directory,
)
from imageserver.runtime.processes import boot_id, namespace, owner_of
from imageserver.runtime.slottable import SharedTable
from tests.system.skips import needs
from tests.unit.processes import LIMITS, TICKET, holder, python

ME = os.geteuid()


@pytest.fixture
def table(tmp_path: Path) -> Iterator[SharedTable]:
    table = SharedTable(str(tmp_path), LIMITS)
    yield table
    table.close()


def _mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


def _state(directory: Path) -> list[tuple[Path, int, int]]:
    """Return all there is with its mode and time of change; to look changes the time of access."""
    found = [directory, *directory.rglob("*")]
    return sorted((path, path.stat().st_mode, path.stat().st_ctime_ns) for path in found)


def test_a_missing_directory_is_made_for_us_alone(tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        prepare_directory(str(tmp_path / "run"))
    finally:
        os.umask(umask)

    assert _mode(tmp_path / "run") == 0o700


@pytest.mark.parametrize("mode", [0o755, 0o1777, 0o000], ids=["open", "like-tmp", "none"])
def test_a_directory_that_is_not_private_is_refused_and_left_as_it_is(
    tmp_path: Path, mode: int
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(mode)

    for use in (prepare_directory, lambda path: examine_runtime(path, 1)):
        with pytest.raises(UnusableDirectory, match=f"has mode {mode:04o}, not 0700, and is left"):
            use(str(tmp_path / "run"))

    assert _mode(tmp_path / "run") == mode


def test_a_directory_made_under_a_strange_umask_can_be_used(tmp_path: Path) -> None:
    umask = os.umask(0o277)
    try:
        prepare_directory(str(tmp_path / "run"))
    finally:
        os.umask(umask)

    assert _mode(tmp_path / "run") == 0o700


def test_a_directory_with_files_of_others_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(0o700)
    (tmp_path / "run" / "thesis.tex").touch()
    (tmp_path / "run" / "locks").mkdir(0o700)

    with pytest.raises(UnusableDirectory, match=r"none of this server's \(thesis.tex\)"):
        examine_runtime(str(tmp_path / "run"), 1)
    (tmp_path / "run" / "slots.use").touch()  # it has been a runtime directory before
    examine_runtime(str(tmp_path / "run"), 1)


@pytest.mark.parametrize("is_there", [False, True])
def test_to_examine_changes_nothing(tmp_path: Path, is_there: bool) -> None:
    if is_there:
        (tmp_path / "run").mkdir(0o700)
    before = _state(tmp_path)

    examine_runtime(str(tmp_path / "run"), slots.SIZE)

    assert _state(tmp_path) == before


@pytest.mark.parametrize("is_there", [False, True])
def test_a_full_file_system_is_found_before_a_table_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_there: bool
) -> None:
    if is_there:
        (tmp_path / "run").mkdir(0o700)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)

    with pytest.raises(UnusableDirectory, match=r"run cannot be made or used \(No space left"):
        examine_runtime(str(tmp_path / "run"), slots.SIZE)


def test_a_link_to_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(0o755)
    (tmp_path / "run").symlink_to("real")

    with pytest.raises(UnusableDirectory, match=f"not a directory that belongs to uid {ME}"):
        prepare_directory(str(tmp_path / "run"))
    assert _mode(tmp_path / "real") == 0o755


def test_a_link_to_nowhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to("nowhere")

    with pytest.raises(UnusableDirectory):
        prepare_directory(str(tmp_path / "run"))
    assert not (tmp_path / "nowhere").exists()


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").touch()

    with pytest.raises(UnusableDirectory, match="is not a directory"):
        prepare_directory(str(tmp_path / "run"))


@needs("owners")
def test_a_directory_of_a_stranger_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(0o755)
    os.chown(tmp_path / "run", 12345, 0)

    with pytest.raises(UnusableDirectory, match=f"belongs to uid {ME}"):
        prepare_directory(str(tmp_path / "run"))
    assert _mode(tmp_path / "run") == 0o755


def test_a_directory_that_cannot_be_made_says_why(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "run"

    with pytest.raises(UnusableDirectory, match=r"made or used \(No such file or directory\)"):
        prepare_directory(str(path))


def test_a_private_file_is_for_us_alone(tmp_path: Path) -> None:
    os.close(open_private(str(tmp_path), "slots"))

    assert _mode(tmp_path / "slots") == 0o600


def test_a_private_file_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("text")
    (tmp_path / "slots").symlink_to("victim")

    with pytest.raises(OSError, match="symbolic links"):
        open_private(str(tmp_path), "slots")


def test_a_private_file_is_not_passed_on_to_other_programs(tmp_path: Path) -> None:
    fd = open_private(str(tmp_path), "slots")

    assert not os.get_inheritable(fd)
    os.close(fd)


def test_a_table_without_room_is_not_made(
    tmp_path: Path, table: SharedTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match="No space left"):
            table.open()

    assert os.listdir(tmp_path) == ["slots.use"]
    table.open()
    size, blocks = (tmp_path / "slots").stat().st_size, (tmp_path / "slots").stat().st_blocks
    assert (size, blocks * 512 >= size) == (slots.SIZE, True)


# What is found


def test_what_was_held_is_still_held_after_reopening(tmp_path: Path, table: SharedTable) -> None:
    table.claim(Kind.WRITE, TICKET)
    table.close()

    with pytest.raises(NoSlot):
        SharedTable(str(tmp_path), LIMITS).claim(Kind.WRITE, TICKET)


def _strangers(boot: bytes, version: int, where: int = namespace()) -> bytes:
    """Return a whole table of another boot, version or namespace, with a reader."""
    buffer = bytearray(slots.SIZE)
    slots.format_table(memoryview(buffer), boot, where)
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
    before = os.listdir("/proc/self/fd")

    with pytest.raises(IncompatibleTable, match=_USED):
        tablefile.examine(str(tmp_path))
    with pytest.raises(IncompatibleTable, match=_USED):
        table.open()

    assert (tmp_path / "slots").read_bytes() == text
    table.close()
    assert os.listdir("/proc/self/fd") == before
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
    before = os.listdir("/proc/self/fd")

    table.claim(Kind.READ, TICKET)
    table.close()
    table.close()

    assert os.listdir("/proc/self/fd") == before


def test_what_one_process_has_said_no_other_says_again(tmp_path: Path, table: SharedTable) -> None:
    script = 'print(table.is_first("here"), table.is_first("there"))'
    out, _ = python(script, tmp_path).communicate(timeout=30)

    assert out == "True True\n"
    assert [table.is_first(text) for text in ("here", "there", "nowhere", "nowhere")] == [
        *(False, False, True, False)
    ]


# What is damaged


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
