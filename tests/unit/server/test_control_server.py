# SPDX-License-Identifier: Apache-2.0
"""A peer of the control socket, here one end of a pair, gets an answer whatever happens."""

import errno
import json
import os
import socket
from collections.abc import Callable
from typing import Any

import pytest

from imageserver.core.control_protocol import Command
from imageserver.core.errors import StateFull
from imageserver.server.control import ControlServer


class _Failing:
    """``Administration`` on a machine where something is wrong."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def run(self, _command: Command, _is_wanted: Callable[[], bool]) -> bytes:
        raise self._error


@pytest.mark.parametrize(
    ("error", "message", "is_logged"),
    [
        pytest.param(StateFull("no room"), "server state unavailable: no room", False, id="ours"),
        pytest.param(
            OSError(errno.EIO, os.strerror(errno.EIO)), "internal error", True, id="system"
        ),
        pytest.param(BrokenPipeError(), "internal error", True, id="looks-like-the-peer"),
        pytest.param(ZeroDivisionError(), "internal error", True, id="defect"),
    ],
)
def test_what_cannot_be_carried_out_is_answered_in_a_line(
    error: Exception, message: str, is_logged: bool, caplog: pytest.LogCaptureFixture
) -> None:
    ours, theirs = socket.socketpair()
    administration: Any = _Failing(error)
    server = ControlServer(administration, timeout=5)
    with theirs:
        theirs.sendall(b'{"action":"status"}\n')
        server._serve(ours)
        text = theirs.recv(65536)
        assert theirs.recv(1) == b""

    assert text.endswith(b"\n")
    assert json.loads(text) == {"status": "error", "message": message}
    assert any(record.exc_info for record in caplog.records) is is_logged
