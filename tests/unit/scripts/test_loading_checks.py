# SPDX-License-Identifier: Apache-2.0
"""The load test's checks: they pass what is right, and nothing else."""

import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from lab.model import WrongBytes, check_extents
from loading.client import Answer, Call, Client, Reporter
from loading.images import Image, needed, pieces
from loading.ledger import Image as Lockable
from loading.ledger import Kind, Ledger, Limits
from loading.parameters import Parameters, Readable, parse
from loading.report import REQUESTS, Row, idle, missing

from tests.system.harness import ROOT

DISK = Lockable("disk", is_nbd=True)
DATA = b"a" * 4 + bytes(4) + b"b" * 4


def image() -> Image:
    return Image("disk", DISK, 12, is_whole=True, content=DATA, base=b"a" * 4 + bytes(8))


def extent(start: int, length: int, *, zero: bool, dirty: bool | None = None) -> dict[str, object]:
    flags = {"zero": zero} if dirty is None else {"dirty": dirty, "zero": zero}
    return {"start": start, "length": length, **flags}


# Bytes


def test_a_range_must_be_whole_and_right():
    image().check(None, 2, 6, DATA[2:6])
    with pytest.raises(WrongBytes, match=r"^3 bytes instead of 4$"):
        image().check(None, 2, 6, DATA[2:5])
    with pytest.raises(WrongBytes, match=r"^wrong from byte 5 on$"):
        image().check(None, 2, 6, b"aa\0b")


# Extents

RIGHT = [extent(0, 4, zero=False), extent(4, 4, zero=True), extent(8, 4, zero=False)]
CHANGED = [
    extent(0, 4, zero=False, dirty=False),
    extent(4, 4, zero=True, dirty=False),
    extent(8, 4, zero=False, dirty=True),
]


@pytest.mark.parametrize(("extents", "dirty"), [(RIGHT, False), (CHANGED, True)])
def test_extents_that_cover_the_image_and_tell_the_truth_pass(extents: list, dirty: bool):
    check_extents(extents, image(), None, dirty=dirty)


@pytest.mark.parametrize(
    ("extents", "why"),
    [
        (RIGHT[:2], "extents end at 8 instead of 12"),
        (RIGHT[1:], r"extents: .* at 0"),
        ([RIGHT[0], RIGHT[2]], r"extents: .* at 4"),
        ([extent(0, 0, zero=True), *RIGHT], r"extents: .* at 0"),
        (CHANGED, r"extents: .* at 0"),
        ([RIGHT[0], extent(4, 2, zero=True), extent(6, 2, zero=True), RIGHT[2]], ".* agree at 6"),
        ([extent(0, 12, zero=True)], r"extents: data in \[0, 12\), which is said to be zero"),
    ],
    ids=["short", "late", "gap", "empty", "fields", "unmerged", "zero"],
)
def test_extents_that_are_wrong_do_not(extents: list, why: str):
    with pytest.raises(WrongBytes, match=f"^{why}$"):
        check_extents(extents, image(), None, dirty=False)


def test_what_has_changed_must_be_dirty():
    lie = [*CHANGED[:2], extent(8, 4, zero=False, dirty=False)]
    with pytest.raises(WrongBytes, match=r"^extents: changed, but not dirty: \[8, 12\)$"):
        check_extents(lie, image(), None, dirty=True)


def test_a_backup_needs_what_is_not_zero_and_an_incremental_one_what_is_dirty_too():
    assert needed(RIGHT) == [(0, 4), (8, 12)]
    assert needed(CHANGED) == [(8, 12)]
    assert pieces([(0, 5), (8, 10)], 2) == [(0, 2), (2, 4), (4, 5), (8, 10)]


# Answers


class Scripted(Client):
    """A client whose server says what the test wants, and nothing else."""

    def __init__(self, status: int, body: bytes, *, retry: bool = True, others: bool = False):
        self.fired: list[tuple[str, str]] = []
        ledger = Ledger(Limits(1, 1))
        super().__init__("http://x", "user", Reporter(ledger, self._fire, others=others))
        self._answer = Answer(status, {"retry-after": "1"} if retry else {}, body)

    def _fire(self, *, name: str, exception: Exception | None, **_fields: object) -> None:
        self.fired.append((name, str(exception or "")))

    def _exchange(self, *_arguments: object) -> Answer:
        return self._answer

    def get(self, kind: Kind | None = Kind.READ) -> Answer | None:
        return self.ask(Call("GET", "GET", "/images/disk", kind=kind, image=DISK))


READS = b'{"error":"too many parallel reads"}'
BUSY = b'{"error":"image busy"}'


def test_a_refusal_without_a_cause_is_a_failure():
    client = Scripted(503, READS)
    answer = client.get()
    assert answer
    assert answer.refused
    assert client.fired == [("GET", "503 too many parallel reads: no limit explains it")]


def test_a_refusal_with_a_cause_has_a_line_of_its_own():
    client = Scripted(503, READS)
    client._reporter.ledger.begin(Kind.READ, DISK, 0.0)
    client.get()
    client._reporter.close()
    assert client.fired == [("GET: refused", "")]


def test_where_others_use_the_server_every_refusal_counts_as_explained():
    client = Scripted(503, READS, others=True)
    client.get()
    assert client.fired == [("GET: refused", "")]


@pytest.mark.parametrize(
    ("status", "body", "retry", "kind"),
    [
        (503, b'{"error":"server busy"}', True, Kind.READ),
        (503, b'{"error":"too many parallel writes"}', True, Kind.READ),
        (503, READS, True, Kind.WRITE),
        (503, READS, False, Kind.READ),
        (409, BUSY, True, None),
        (500, b'{"error":"backend error"}', True, Kind.READ),
        (404, b'{"error":"unknown image_id"}', True, Kind.READ),
    ],
    ids=["busy", "writes", "reads", "no Retry-After", "a probe", "500", "404"],
)
def test_what_is_no_refusal_that_limits_explain_is_a_failure(
    status: int, body: bytes, retry: bool, kind: Kind | None
):
    client = Scripted(status, body, retry=retry, others=True)
    assert client.get(kind) is None
    ((name, problem),) = client.fired
    assert (name, problem[:3]) == ("GET", str(status))


# A run that has done too little


def row(user: str, done: int) -> Row:
    return Row(user, "GET", done, 5, 0, (1.0, 1.0, 1.0), 0.0)


def test_a_user_who_got_too_little_done_fails_the_run():
    found = [row("backup", 2), row("backup", 1), row("probe", 2)]
    assert idle(found, {"backup", "probe", "restore"}) == [
        "probe: 2 done, at least 3 are needed",
        "restore: 0 done, at least 3 are needed",
    ]


def test_a_run_without_users_fails():
    assert idle([], set()) == ["no user was started"]


def test_every_kind_of_request_must_have_been_made():
    figures = [
        {"method": user, "name": name, "num_requests": 4, "num_failures": 1}
        for user, names in REQUESTS.items()
        for name in names
    ]
    assert missing(figures) == []
    figures[0]["num_failures"] = 2
    first = f"{figures[0]['method']}: {figures[0]['name']}"
    assert missing(figures) == [f"{first}: 2 done, at least 3 are needed"]
    assert len(missing([])) == len(figures) > 20


# Parameters


def options(**given: str) -> Namespace:
    empty = dict.fromkeys(("read", "write", "config_dir", "control_socket"), "")
    return Namespace(**empty | {"others": False} | given)


def test_nothing_is_written_unless_asked_for():
    assert parse(options(read="a b=/f c=/f=/g")) == Parameters(
        read=(Readable("a"), Readable("b", Path("/f")), Readable("c", Path("/f"), Path("/g")))
    )


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"read": "a=/f=/g=/h"}, "is not ID"),
        ({"read": "a="}, "is not ID"),
        ({"read": "a", "write": "a"}, "only once"),
        ({"read": "a", "config_dir": "/nowhere"}, "no transfer file"),
        ({"read": "a", "control_socket": "/x"}, "needs --config-dir"),
    ],
)
def test_parameters_that_do_not_fit_together_are_refused(given: dict[str, str], why: str):
    with pytest.raises(ValueError, match=why):
        parse(options(**given))


def test_nothing_that_tests_import_loads_gevent():
    names = ("client", "images", "report", "run")
    code = f"import sys, {', '.join(f'loading.{name}' for name in names)}\n"
    code += "sys.exit('gevent' in sys.modules)"
    command = [sys.executable, "-c", code]
    path = str(ROOT / "scripts")
    assert subprocess.run(command, env={"PYTHONPATH": path}, check=False).returncode == 0
