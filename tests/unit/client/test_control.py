# SPDX-License-Identifier: Apache-2.0
"""Transfers as files of a config directory, and what a control socket may answer."""

import json
import os
import socket
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from imageserver.backends.file.kind import FileImage
from imageserver.backends.nbd.kind import NbdImage
from imageserver.backends.table import KINDS
from imageserver.client.failures import Busy, Failed, LocalFailure, Refused, Unreachable
from imageserver.client.local.control_client import Directory, Socket
from imageserver.core.transfer import Transfer, parse_transfer

ONE = Transfer("one", NbdImage("/s", "e", "b"), read_only=True, idle_seconds=60)
TWO = Transfer("two \u00fc", FileImage("/images/a"))


def test_a_file_says_what_the_server_understands(tmp_path: Path) -> None:
    for transfer in (ONE, TWO):
        Directory(str(tmp_path)).add(transfer)
        text = (tmp_path / transfer.id).read_bytes()
        assert parse_transfer(transfer.id, text, KINDS) == transfer
    assert sorted(os.listdir(tmp_path)) == ["one", "two \u00fc"]


@pytest.mark.parametrize(("directory", "file"), [(0o700, 0o600), (0o2750, 0o640)])
def test_a_file_is_private_or_the_groups_that_a_directory_hands_on(
    tmp_path: Path, directory: int, file: int
) -> None:
    tmp_path.chmod(directory)
    before = os.umask(0o000)
    try:
        Directory(str(tmp_path)).add(ONE)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "one").stat().st_mode) == file


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    place = Directory(str(tmp_path))
    place.add(ONE)
    with (tmp_path / "one").open("rb") as old:
        place.add(Transfer("one", FileImage("/b")))
        assert parse_transfer("one", old.read(), KINDS) == ONE
    assert place.list() == [Transfer("one", FileImage("/b"))]


def test_what_cannot_be_renamed_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    with pytest.raises(LocalFailure, match=r"cannot write .*: Is a directory"):
        Directory(str(tmp_path)).add(ONE)
    assert os.listdir(tmp_path) == ["one"]


def test_a_list_has_what_counts_in_order(tmp_path: Path) -> None:
    place = Directory(str(tmp_path))
    for transfer in (TWO, ONE):
        place.add(transfer)
    (tmp_path / "a directory").mkdir()
    (tmp_path / "no json").write_text("{")
    (tmp_path / "large").write_text(" " * (1 << 20))
    (tmp_path / "link").symlink_to("one")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / os.fsdecode(b"\xff")).write_bytes((tmp_path / "one").read_bytes())
    (tmp_path / ".imagectl-0").write_bytes((tmp_path / "one").read_bytes())
    assert place.list() == [ONE, TWO]


def test_a_file_is_removed_and_one_that_is_not_there_is_fine(tmp_path: Path) -> None:
    place = Directory(str(tmp_path))
    place.add(ONE)
    for _ in range(2):
        place.remove("one", None, force=False)
    assert os.listdir(tmp_path) == []
    with pytest.raises(Refused, match="only a control socket"):
        place.remove("one", 5, force=False)


def test_a_directory_that_is_not_there_is_told_so(tmp_path: Path) -> None:
    place = Directory(str(tmp_path / "none"))
    for use in (lambda: place.add(ONE), place.list):
        with pytest.raises(LocalFailure, match=r"none: No such file or directory"):
            use()


@contextmanager
def answering(path: Path, *answers: bytes) -> Iterator[list[dict[str, object]]]:
    """Answer one peer after the other; yields what they ask."""
    asked: list[dict[str, object]] = []
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
        Socket(str(tmp_path / "s")).list()


def test_pages_are_asked_for_until_there_are_no_more(tmp_path: Path) -> None:
    def page(*names: str, more: bool) -> bytes:
        listed = [{"transfer_id": name, "config": {"socket": "/s"}} for name in names]
        return json.dumps({"status": "ok", "transfers": listed, "more": more}).encode() + b"\n"

    pages = page("a", "b", more=True), page("c", more=False)
    with answering(tmp_path / "s", *pages) as asked:
        found = Socket(str(tmp_path / "s")).list()
    assert [transfer.id for transfer in found] == ["a", "b", "c"]
    assert asked == [{"action": "list"}, {"action": "list", "after": "b"}]


def test_nobody_there_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(Unreachable, match=r"no answer from the control socket .*: No such file"):
        Socket(str(tmp_path / "s")).add(ONE)
