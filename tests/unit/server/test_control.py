# SPDX-License-Identifier: Apache-2.0
"""The language of the control socket: every command, and the one sentence for what is none."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imageserver.backends.file.kind import FileImage
from imageserver.backends.nbd.kind import NbdImage
from imageserver.backends.table import KINDS
from imageserver.core.control_protocol import (
    InvalidCommand,
    List,
    Peer,
    Register,
    Status,
    Unregister,
    failed,
    page,
    parse_command,
    succeeded,
)
from imageserver.core.transfer import DAY_SECONDS, Transfer

FILE = {"backend": "file", "file": "/images/a"}


def parse(**fields: object) -> object:
    return parse_command(json.dumps(fields).encode(), KINDS)


@pytest.mark.parametrize(
    ("fields", "command"),
    [
        pytest.param({"action": "status"}, Status(), id="status"),
        pytest.param({"action": "status", "transfer_id": None}, Status(), id="status-null"),
        pytest.param({"action": "status", "transfer_id": "x"}, Status("x"), id="status-of-one"),
        pytest.param(
            {"action": "register", "transfer_id": "x", "config": FILE},
            Register(Transfer("x", FileImage("/images/a"))),
            id="register-file",
        ),
        pytest.param(
            {
                "action": "register",
                "transfer_id": "..x",
                "config": {"socket": "/s", "export": "e", "export_bitmap": "b", "more": [1]},
            },
            Register(Transfer("..x", NbdImage("/s", "e", "b"))),
            id="register-nbd",
        ),
        pytest.param(
            {
                "action": "register",
                "transfer_id": "x",
                "config": FILE | {"read_only": True, "idle_timeout_seconds": 5},
            },
            Register(Transfer("x", FileImage("/images/a"), read_only=True, idle_seconds=5)),
            id="register-with-options",
        ),
        pytest.param(
            {
                "action": "register",
                "transfer_id": "x",
                "config": FILE | {"idle_timeout_seconds": -1},
            },
            Register(Transfer("x", FileImage("/images/a"), idle_seconds=DAY_SECONDS)),
            id="below-a-second-means-a-day",
        ),
        pytest.param(
            {"action": "unregister", "transfer_id": "x"}, Unregister("x"), id="unregister"
        ),
        pytest.param(
            {"action": "unregister", "transfer_id": "x", "timeout": None, "force": None},
            Unregister("x"),
            id="unregister-nulls",
        ),
        pytest.param(
            {"action": "unregister", "transfer_id": "x", "timeout": 0.5, "force": True},
            Unregister("x", 0.5, force=True),
            id="unregister-bounded-by-force",
        ),
        pytest.param(
            {"action": "unregister", "transfer_id": "x", "timeout": 10**39},
            Unregister("x", 31_536_000.0),
            id="unregister-in-a-year",
        ),
        pytest.param({"action": "list"}, List(), id="list"),
        pytest.param({"action": "list", "after": None}, List(), id="list-null"),
        pytest.param({"action": "list", "after": "x"}, List("x"), id="list-the-rest"),
    ],
)
def test_a_command_is_understood(fields: dict[str, object], command: object) -> None:
    assert parse(**fields) == command


def register(**fields: object) -> dict[str, object]:
    return {"action": "register", "transfer_id": "x", "config": FILE} | fields


def unregister(**fields: object) -> dict[str, object]:
    return {"action": "unregister", "transfer_id": "x"} | fields


#: What is told of requests that are JSON objects.
WRONG: list[tuple[dict[str, object], str]] = [
    ({}, "missing action"),
    ({"action": None}, "missing action"),
    ({"action": "add"}, "unknown action: add"),
    ({"action": ""}, "unknown action: "),
    ({"action": 5}, "unknown action: 5"),
    ({"action": ["status"]}, 'unknown action: ["status"]'),
    ({"action": "x" * 100}, "unknown action: " + "x" * 64 + "..."),
    ({"action": "register"}, "missing transfer_id or config"),
    ({"action": "register", "transfer_id": "x"}, "missing transfer_id or config"),
    ({"action": "register", "config": FILE}, "missing transfer_id or config"),
    (register(config=None), "missing transfer_id or config"),
    (register(config=[]), "invalid config: not a JSON object"),
    (register(config={}), 'invalid config: missing "socket"'),
    (register(config={"backend": "ceph"}), "unsupported backend: ceph"),
    (register(config={"backend": 5}), 'invalid config: "backend" must be a string'),
    (
        register(config=FILE | {"idle_timeout_seconds": "5"}),
        'invalid config: "idle_timeout_seconds" must be an integer',
    ),
    (
        register(config=FILE | {"idle_timeout_seconds": True}),
        'invalid config: "idle_timeout_seconds" must be an integer',
    ),
    (
        register(config=FILE | {"idle_timeout_seconds": 1.0}),
        'invalid config: "idle_timeout_seconds" must be an integer',
    ),
    *((register(transfer_id=bad), "invalid transfer_id") for bad in ("", "a/b", "..", "*", 5, [])),
    *((unregister(transfer_id=bad), "invalid transfer_id") for bad in ("", 5, True, [])),
    ({"action": "status", "transfer_id": "a/b"}, "invalid transfer_id"),
    ({"action": "status", "transfer_id": "x" * 256}, "invalid transfer_id"),
    *(({"action": "list", "after": bad}, "invalid after") for bad in ("", "a/b", 5)),
    (unregister(transfer_id=None), "missing transfer_id"),
    *((unregister(timeout=bad), "invalid timeout: not a number of seconds") for bad in (-1, "5")),
    (unregister(timeout=True), "invalid timeout: not a number of seconds"),
    *((unregister(force=bad), "invalid force: not true or false") for bad in (1, "true", [])),
]


@pytest.mark.parametrize(
    ("fields", "message"), WRONG, ids=[json.dumps(fields)[:60] for fields, _ in WRONG]
)
def test_what_is_no_command_is_told_so(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidCommand) as raised:
        parse(**fields)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "invalid JSON: Expecting value at character 0"),
        (b"{", "invalid JSON: "),
        (b'{"action":"sta', "invalid JSON: "),
        (b'{"action":"status"}{"action":"status"}', "invalid JSON: "),
        (b"status", "invalid JSON: "),
        (b'{"action":NaN}', "invalid JSON: NaN is not a JSON value"),
        (b"\xff\xfe", "invalid JSON: not UTF-8 at byte 0"),
        (b"[" * 100_000, "invalid JSON: nested too deeply"),
        (b"[]", "request must be a JSON object"),
        (b'"status"', "request must be a JSON object"),
        (b"null", "request must be a JSON object"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_is_no_object_is_told_so(text: bytes, message: str) -> None:
    with pytest.raises(InvalidCommand) as raised:
        parse_command(text, KINDS)
    assert str(raised.value).startswith(message)


@given(st.binary() | st.recursive(st.none() | st.text(), st.lists).map(lambda v: repr(v).encode()))
def test_no_text_does_anything_else(text: bytes) -> None:
    with pytest.raises(InvalidCommand):
        parse_command(text, KINDS)


def test_an_answer_is_one_line_whatever_it_says() -> None:
    assert succeeded(3) == b'{"status":"ok","active_transfers":3}\n'
    assert succeeded(0, last_error="a\nb") == (
        b'{"status":"ok","active_transfers":0,"last_error":"a\\nb"}\n'
    )
    assert failed("unknown action: \u00fc") == (
        b'{"status":"error","message":"unknown action: \\u00fc"}\n'
    )


def test_a_page_tells_each_transfer_as_it_may_be_registered_again() -> None:
    transfer = Transfer("x", NbdImage("/s", "e", "b"), read_only=True, idle_seconds=5)
    shown = page([transfer])
    config = {
        "backend": "nbd",
        "socket": "/s",
        "export": "e",
        "export_bitmap": "b",
        "flush": "connection",
        "sparse": True,
        "read_only": True,
        "idle_timeout_seconds": 5,
    }
    assert shown == {"transfers": [{"transfer_id": "x", "config": config}], "more": False}
    assert parse(action="register", transfer_id="x", config=config) == Register(transfer)


def test_a_page_has_room_for_so_much_but_always_for_one() -> None:
    large = [Transfer(str(number), FileImage("/" + 60_000 * "x")) for number in range(30)]
    assert page([]) == {"transfers": [], "more": False}
    assert page(large[:1])["more"] is False
    first = page(large)
    assert (len(first["transfers"]), first["more"]) == (18, True)  # 18 x 60 kB > 1 MiB
    assert page(large[:18])["more"] is False
    assert len(page([Transfer("x", FileImage("/" + (2 << 20) * "x"))])["transfers"]) == 1


@pytest.mark.parametrize(
    ("peer", "may"),
    [
        pytest.param(Peer(0, frozenset({0})), True, id="root"),
        pytest.param(Peer(5, frozenset({7})), True, id="own-user"),
        pytest.param(Peer(6, frozenset({5})), True, id="own-group"),
        pytest.param(Peer(6, frozenset({7, 5})), True, id="own-group-among-others"),
        pytest.param(Peer(6, frozenset({0, 6})), False, id="roots-group-is-not-root"),
        pytest.param(Peer(6, frozenset()), False, id="stranger"),
    ],
)
def test_root_and_the_servers_user_and_group_may_control(peer: Peer, may: bool) -> None:
    assert peer.may_control(uid=5, gid=5) is may


def test_nothing_is_asked_of_this_process() -> None:
    """The module is of the vocabulary: whose rights count is a parameter."""
    assert Peer(os.geteuid() + 1, frozenset()).may_control(os.geteuid() + 1, 0)
