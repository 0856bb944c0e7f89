# SPDX-License-Identifier: Apache-2.0
"""What a control socket may answer, and what it is asked."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from imageserver.backends.nbd.kind import NbdImage
from imageserver.client.failures import Busy, Failed, Refused, Unreachable
from imageserver.client.local.control_socket import ControlSocket
from imageserver.core.token import UNTOLD, Token
from imageserver.core.transfer import Transfer, to_fields

ONE = Transfer("one", NbdImage("/s", "e", "b"), read_only=True, idle_seconds=60)


@contextmanager
def answering(path: Path, *answers: bytes) -> Iterator[list[dict[str, Any]]]:
    """Answer one peer after the other; yields what they ask."""
    asked: list[dict[str, Any]] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            for answer in answers:
                peer, _ = listener.accept()
                with peer, peer.makefile("rb") as file:
                    asked.append(json.loads(file.readline()))
                    peer.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield asked
        thread.join(10)


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (b'{"status":"error","message":"no"}\n', Refused, "the server refused: no"),
        (b'{"status":"error","message":"busy"}\n', Busy, "requests still use the transfer"),
        (b"HTTP/1.1 400 Bad Request\r\n", Failed, "is it a control socket"),
        (b"", Failed, "is it a control socket"),
        (b"[]\n", Failed, "answered with no status"),
        (b'{"message":"no"}\n', Failed, "answered with no status"),
        (b"[" * 100_000, Failed, "answered with no JSON"),
        (b'{"status":"ok"}\n', Failed, "a list that is none"),
        (b'{"status":"ok","transfers":[{"transfer_id":"x","config":{}}]}\n', Failed, "is none"),
    ],
)
def test_what_is_no_list_is_told_so(
    tmp_path: Path, answer: bytes, error: type[Exception], message: str
) -> None:
    with answering(tmp_path / "s", answer), pytest.raises(error, match=message):
        ControlSocket(str(tmp_path / "s")).list()


def test_what_goes_on_after_the_servers_own_time_is_busy(tmp_path: Path) -> None:
    answer = b'{"status":"ok","active_transfers":0,"busy":true}\n'
    with (
        answering(tmp_path / "s", answer),
        pytest.raises(Busy, match="requests still use the transfer"),
    ):
        ControlSocket(str(tmp_path / "s")).remove("x", None, force=False)


def test_pages_are_asked_for_until_there_are_no_more(tmp_path: Path) -> None:
    def page(*names: str, more: bool) -> bytes:
        listed = [{"transfer_id": name, "config": {"socket": "/s"}} for name in names]
        return json.dumps({"status": "ok", "transfers": listed, "more": more}).encode() + b"\n"

    pages = page("a", "b", more=True), page("c", more=False)
    with answering(tmp_path / "s", *pages) as asked:
        found = ControlSocket(str(tmp_path / "s")).list()
    assert [transfer.id for transfer in found] == ["a", "b", "c"]
    assert asked == [{"action": "list"}, {"action": "list", "after": "b"}]


def test_nobody_there_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(Unreachable, match=r"no answer from the control socket .*: No such file"):
        ControlSocket(str(tmp_path / "s")).add(ONE)


def test_of_a_listed_transfer_it_is_only_known_that_it_has_a_token(tmp_path: Path) -> None:
    listed = to_fields(replace(ONE, token=Token("s3cr3t")))
    answer = {"status": "ok", "transfers": [{"transfer_id": "one", "config": listed}]}
    with answering(tmp_path / "s", json.dumps(answer).encode() + b"\n"):
        (found,) = ControlSocket(str(tmp_path / "s")).list()

    assert found == replace(ONE, token=UNTOLD)


def test_a_transfer_is_registered_with_its_token(tmp_path: Path) -> None:
    with answering(tmp_path / "s", b'{"status":"ok"}\n') as asked:
        ControlSocket(str(tmp_path / "s")).add(replace(ONE, token=Token("s3cr3t")))

    assert [request["config"]["token"] for request in asked] == ["s3cr3t"]
