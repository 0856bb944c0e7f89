# SPDX-License-Identifier: Apache-2.0
"""The control socket's path in the master: checked, and taken over from a dead server only."""

import socket
import threading
from pathlib import Path

import pytest

from imageserver.server import control as module
from imageserver.server.control import UnusableSocket, check_socket, take_over


def test_a_socket_that_can_be_made_or_is_there_is_no_problem(tmp_path: Path) -> None:
    check_socket(str(tmp_path / "new"))
    with socket.create_server(str(tmp_path / "there"), family=socket.AF_UNIX):
        check_socket(str(tmp_path / "there"))


def test_what_stands_in_a_sockets_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UnusableSocket, match="file is not a socket"):
        check_socket(str(tmp_path / "file"))
    with pytest.raises(UnusableSocket, match="none is no directory where"):
        check_socket(str(tmp_path / "none" / "socket"))


def test_a_living_servers_socket_is_not_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_TAKEOVER_SECONDS", 0.06)
    path = str(tmp_path / "socket")
    take_over(path)
    with (
        socket.create_server(path, family=socket.AF_UNIX),
        pytest.raises(UnusableSocket, match="another server listens at"),
    ):
        take_over(path)
    take_over(path)


def test_a_dead_servers_socket_is_waited_for(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    listener = socket.create_server(path, family=socket.AF_UNIX)
    timer = threading.Timer(0.06, listener.close)
    timer.start()
    take_over(path)
    timer.join()
    assert listener.fileno() == -1
