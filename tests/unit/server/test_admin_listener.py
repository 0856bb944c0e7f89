# SPDX-License-Identifier: Apache-2.0
"""Which listeners are for operators, and who may come in."""

import os
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from imageserver.core.control_protocol import Peer
from imageserver.server import admin_listener as module
from imageserver.server.admin_listener import admin_name, admit, bindable


def _listener(name: object) -> SimpleNamespace:
    """Return a listener that was inherited: it knows its name only."""
    return SimpleNamespace(getsockname=lambda: name)


@pytest.mark.parametrize(
    ("address", "name"),
    [
        pytest.param("127.0.0.1:54324", ("127.0.0.1", 54324), id="tcp"),
        pytest.param("[::1]:54324", ("::1", 54324, 0, 0), id="tcp6"),
        pytest.param("localhost:54324", ("127.0.0.1", 54324), id="host"),
        pytest.param("unix:/run/admin", "/run/admin", id="unix"),
        pytest.param("unix:@admin", b"\0admin", id="abstract"),
    ],
)
def test_an_admin_listener_is_known_by_its_name(address: str, name: object) -> None:
    assert admin_name(_listener(name), ("127.0.0.1:1", address)) == name
    assert admin_name(_listener(name), ("127.0.0.1:1", "unix:/other")) is None


def test_one_that_was_bound_just_now_is_known_by_what_it_was_bound_to() -> None:
    listener = _listener(("192.0.2.1", 54324))
    listener.cfg_addr = ("admin.invalid", 54324)
    assert admin_name(listener, ("admin.invalid:54324",)) == ("192.0.2.1", 54324)


def test_an_abstract_address_is_bound_as_the_kernel_names_it() -> None:
    assert bindable("unix:@admin") == "unix:\0admin"


@pytest.mark.parametrize(
    ("uid", "may"), [(0, True), (os.geteuid(), True), (os.geteuid() + 7, False)]
)
def test_a_unix_socket_is_for_root_and_the_servers_user(
    monkeypatch: pytest.MonkeyPatch, uid: int, may: bool
) -> None:
    monkeypatch.setattr(module, "peer_of", lambda _: Peer(uid, frozenset({os.getegid()})))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert admit(ours) is may


def test_over_tcp_anybody_may(tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET) as client:
        assert admit(client)
