# SPDX-License-Identifier: Apache-2.0
"""The slot table between real processes: exact counts, the dead swept, strangers refused."""

import errno
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from imageserver.core import slots
from imageserver.core.errors import NoSlot, StateUnavailable
from imageserver.core.ports import Ticket
from imageserver.core.slots import Kind, Owner
from imageserver.runtime import slottable
from imageserver.runtime.private import open_private
from imageserver.runtime.processes import _Forks, is_alive, owner_of
from imageserver.runtime.slottable import SharedTable
from tests.system.skips import needs
from tests.unit.logged import told
from tests.unit.processes import LIMITS, TICKET, holder, python, stopped_in_guard

#: Claims until it has had a slot 200 times, and three were in at once. A file of its own
#: counts who is in, independently.
_CONTEND = """
witness = os.open(sys.argv[2], os.O_RDWR)
def count(change):
    fcntl.flock(witness, fcntl.LOCK_EX)
    now, most = struct.unpack("ii", os.pread(witness, 8, 0))
    os.pwrite(witness, struct.pack("ii", now + change, max(most, now + change)), 0)
    fcntl.flock(witness, fcntl.LOCK_UN)
    return max(most, now + change)
print("ready", flush=True)
sys.stdin.readline()
had = most = 0
while had < 200 or most < 3:
    try:
        slot = table.claim(Kind.READ, TICKET)
    except NoSlot:
        os.sched_yield()
        continue
    most = count(1)
    had += 1
    time.sleep(0.0002)
    count(-1)
    slot.release()
"""

#: The child must wait for the guard that its parent holds.
_FORK = """
slottable._GUARD_SECONDS = 0.05
before = table.claim(Kind.READ, TICKET)
with table._open().guard():
    child = os.fork()
    if child == 0:
        try:
            table.claim(Kind.READ, TICKET)
        except StateUnavailable:
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
child = os.fork()
if child == 0:
    slot = table.claim(Kind.READ, TICKET)
    owners = {held.owner.pid for held in table.holders(Kind.READ)}
    os._exit(0 if owners == {os.getpid(), os.getppid()} else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.fixture
def table(tmp_path: Path) -> Iterator[SharedTable]:
    table = SharedTable(str(tmp_path), LIMITS)
    yield table
    table.close()


# Counting


def test_exactly_the_limit_is_granted_and_given_back(table: SharedTable) -> None:
    held = [table.claim(Kind.READ, TICKET) for _ in range(3)]

    with pytest.raises(NoSlot) as raised:
        table.claim(Kind.READ, TICKET)
    held[1].release()
    held.append(table.claim(Kind.READ, TICKET))

    assert (raised.value.kind, table.count(Kind.READ)) == (Kind.READ, 3)


def test_kinds_without_a_limit_have_the_whole_table(table: SharedTable) -> None:
    held = [table.claim(Kind.OTHER, TICKET) for _ in range(slots.CAPACITY)]

    assert len(held) == table.count(Kind.OTHER)
    with pytest.raises(NoSlot):
        table.claim(Kind.WRITE, TICKET)


def test_a_holder_is_shown_with_its_ticket_and_progress(table: SharedTable) -> None:
    table.claim(Kind.READ, TICKET).progress(5, 9)

    (held,) = table.holders(Kind.READ)
    assert Ticket(held.transfer, held.operation, held.image, held.client) == TICKET
    assert (held.owner, held.done, held.expected) == (owner_of(os.getpid()), 5, 9)


def test_releasing_twice_does_not_take_the_next_holders_slot(table: SharedTable) -> None:
    first = table.claim(Kind.WRITE, TICKET)
    first.release()
    second = table.claim(Kind.WRITE, TICKET)
    first.release()
    first.progress(1, 1)

    (held,) = table.holders(Kind.WRITE)
    assert (held.done, held.expected) == (0, 0)
    second.release()
    assert table.count(Kind.WRITE) == 0


def test_processes_in_contention_never_exceed_the_limit(tmp_path: Path, table: SharedTable) -> None:
    witness = tmp_path / "witness"
    witness.write_bytes(bytes(8))
    processes = [python(_CONTEND, tmp_path, witness) for _ in range(4)]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        process.communicate(timeout=60)

    now, most = memoryview(witness.read_bytes()).cast("i")
    assert [process.returncode for process in processes] == [0] * 4
    assert (now, most, table.count(Kind.READ)) == (0, 3, 0)


def test_a_slot_held_by_another_process_counts(tmp_path: Path, table: SharedTable) -> None:
    with holder(tmp_path, Kind.WRITE):
        with pytest.raises(NoSlot):
            table.claim(Kind.WRITE, TICKET)

        assert [held.transfer for held in table.holders(*Kind)] == ["theirs"]


# The dead


def test_a_killed_holders_slot_is_free_for_the_next_claim(
    tmp_path: Path, table: SharedTable, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "imageserver.runtime.slottable")
    with holder(tmp_path, Kind.WRITE) as process:
        process.kill()
        process.wait(10)

        table.claim(Kind.WRITE, TICKET)

    assert [held.transfer for held in table.holders(*Kind)] == ["t1"]
    assert [told(record) for record in caplog.records] == [
        (
            "slot freed: its worker died",
            {"transfer": "theirs", "op": "read", "worker": process.pid},
        )
    ]


def test_a_zombie_counts_as_dead(tmp_path: Path, table: SharedTable) -> None:
    with holder(tmp_path, Kind.WRITE) as process:
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)

        assert owner_of(process.pid) is None
        assert table.sweep() == 1


@needs("x86-64")
def test_a_process_lives_as_long_as_any_of_its_threads(tmp_path: Path) -> None:
    script = """
import ctypes, threading
def stay():
    while owner_line().split()[2] != "Z":
        os.sched_yield()
    print("headless", flush=True)
    sys.stdin.readline()
def owner_line():
    with open("/proc/self/stat") as file:
        return file.read()
threading.Thread(target=stay).start()
ctypes.CDLL(None).syscall(60, 0)
"""
    assert _is_known_while_it_runs(script, tmp_path)


def _is_known_while_it_runs(script: str, directory: Path) -> bool:
    """Tell whether a script, once it has written a line, is a process with an owner."""
    with python(script, directory) as process:
        assert process.stdout is not None
        process.stdout.readline()
        owner = owner_of(process.pid)
        process.kill()
    return owner is not None and owner.pid == process.pid


def test_sweeping_spares_the_living(tmp_path: Path, table: SharedTable) -> None:
    table.claim(Kind.READ, TICKET)
    with holder(tmp_path, Kind.WRITE):
        assert (table.sweep(), table.count(Kind.READ), table.count(Kind.WRITE)) == (0, 1, 1)


def test_this_process_is_alive_and_its_like_of_another_time_is_not() -> None:
    me = owner_of(os.getpid())
    assert me is not None

    assert [is_alive(me), is_alive(Owner(me.pid, me.start + 1))] == [True, False]


def test_a_process_may_have_any_name(tmp_path: Path) -> None:
    script = 'open("/proc/self/comm", "w").write(") Z 1 ("); print(flush=True); input()'
    assert _is_known_while_it_runs(script, tmp_path)


def test_a_forked_child_has_a_guard_and_a_name_of_its_own(tmp_path: Path) -> None:
    out, _ = python(_FORK, tmp_path).communicate(timeout=30)

    assert out == "0\n"


def test_a_forked_process_maps_the_table_once(
    table: SharedTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    parents = table._open()
    monkeypatch.setattr(_Forks, "count", _Forks.count + 1)

    assert table._open() is table._open() is not parents
    parents.close()


def test_a_guard_that_is_never_let_go_is_an_error_not_a_hang(
    table: SharedTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slottable, "_GUARD_SECONDS", 0.01)
    table.open()
    stopped = open_private(str(tmp_path), "slots")
    fcntl.flock(stopped, fcntl.LOCK_EX)

    with pytest.raises(StateUnavailable, match="another process holds its guard"):
        table.claim(Kind.READ, TICKET)
    os.close(stopped)
    table.claim(Kind.READ, TICKET)


def test_a_line_in_the_log_does_not_wait_for_a_guard_that_is_never_let_go(
    table: SharedTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slottable, "_NOTE_SECONDS", 0.01)
    assert [table.is_first("x"), table.is_first("x")] == [True, False]
    with stopped_in_guard(tmp_path):
        began = time.monotonic()
        assert table.is_first("x")
        assert time.monotonic() - began < 1


def test_a_line_is_logged_where_there_is_no_table(tmp_path: Path) -> None:
    assert SharedTable(str(tmp_path / "missing"), LIMITS).is_first("x")


@pytest.mark.parametrize("what", ["claim", "sweep", "living"])
def test_a_table_that_cannot_be_looked_through_is_an_error_of_ours(
    table: SharedTable, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """The system has no descriptor for /proc/PID/stat, which says who lives."""

    def no_descriptor(_owner: Owner) -> bool:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    table.claim(Kind.WRITE, TICKET)
    for name in ("is_alive", "is_exiting"):
        monkeypatch.setattr(slottable, name, no_descriptor)
    asked = {
        "claim": lambda: table.claim(Kind.WRITE, TICKET),
        "sweep": table.sweep,
        "living": lambda: table.living(Kind.WRITE),
    }

    with pytest.raises(StateUnavailable, match="the slot table cannot be used now: Too many open"):
        asked[what]()


def test_a_slot_can_be_given_back_while_the_guard_is_held(table: SharedTable) -> None:
    slot = table.claim(Kind.READ, TICKET)

    with table._open().guard():
        slot.release()

    assert table.count(Kind.READ) == 0


def test_a_dying_holder_is_waited_for(table: SharedTable, monkeypatch: pytest.MonkeyPatch) -> None:
    dying = table.claim(Kind.WRITE, TICKET)
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            dying.release()

    monkeypatch.setattr(slottable, "is_exiting", lambda _: True)
    monkeypatch.setattr(slottable.time, "sleep", sleep)

    table.claim(Kind.WRITE, TICKET).release()
    assert len(waits) == 3


def test_a_holder_that_does_not_end_its_dying_is_believed(
    table: SharedTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    table.claim(Kind.WRITE, TICKET)
    monkeypatch.setattr(slottable, "is_exiting", lambda _: True)
    monkeypatch.setattr(slottable, "EXIT_SECONDS", 0.01)

    with pytest.raises(NoSlot):
        table.claim(Kind.WRITE, TICKET)
