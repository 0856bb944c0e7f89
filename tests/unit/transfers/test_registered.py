# SPDX-License-Identifier: Apache-2.0
"""Registrations in a directory where strangers have been, that is full, or that is locked."""

import contextlib
import errno
import fcntl
import json
import os
import random
from pathlib import Path

import pytest

from imageserver.backends.file.kind import FileImage
from imageserver.core.errors import StateFull, StateUnavailable
from imageserver.core.ports import Owned
from imageserver.core.transfer import Transfer, id_hash
from imageserver.runtime.private import open_private
from imageserver.transfers import registered as module
from imageserver.transfers.registered import RegistrationFiles, parse_id
from imageserver.transfers.usage import ActivityFiles


class _Place:
    def __init__(self, path: Path) -> None:
        self.registered, self.activity = path / "registered", path / "activity"
        for directory in (self.registered, self.activity):
            directory.mkdir(mode=0o700)
        self.files = RegistrationFiles(str(self.registered), ActivityFiles(str(self.activity)))

    def store(self, *names: str) -> None:
        for name in names:
            self.files.store(Transfer(name, FileImage("/x"), idle_seconds=60))

    def ids(self) -> list[str]:
        return [transfer.id for transfer in self.files.all()]


@pytest.fixture
def place(tmp_path: Path) -> _Place:
    return _Place(tmp_path)


def test_all_can_be_made_unknown_at_once(place: _Place) -> None:
    place.store("a", "b")
    (place.registered / "new-0123").touch()  # of another process, that registers now
    used = ActivityFiles(str(place.activity)).find(Owned.REGISTERED, "b", visit=True)
    assert used is not None
    with contextlib.closing(used):
        place.files.clear()
        assert (place.files.count(), place.ids(), used.is_closed) == (0, [], True)

    assert [path.name for path in place.registered.iterdir()] == ["new-0123"]
    assert [path.name for path in place.activity.iterdir()] == [f"registered-{id_hash('b')}"]


def test_one_that_is_being_written_is_neither_counted_nor_complained_of(
    place: _Place, caplog: pytest.LogCaptureFixture
) -> None:
    place.store("a")
    (place.registered / "new-0123").write_bytes(b'{"transfer_id"')

    assert (place.files.count(), place.ids(), caplog.records) == (1, ["a"], [])


def test_the_id_is_read_that_was_written(place: _Place) -> None:
    place.store("\u00fcx")
    (path,) = place.registered.iterdir()
    assert parse_id(path.read_bytes()) == "\u00fcx"


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[1]",
        b"7",
        b"{}",
        b'{"transfer_id":7}',
        b'{"transfer_id":"a/b"}',
        b'{"transfer_id":"\\ud800"}',
        b"[" * 60_000,
        b'{"transfer_id":' * 9_000,
        b'{"transfer_id":' + b"9" * 60_000 + b"}",
    ],
)
def test_what_names_no_id_names_none(text: bytes) -> None:
    assert parse_id(text) is None


def test_whatever_the_bytes_nothing_is_raised() -> None:
    whole = json.dumps({"transfer_id": "x", "backend": "file", "file": "/x"}).encode()
    choose = random.Random(15)  # noqa: S311 - no secret
    for _ in range(2000):
        text = bytearray(whole)
        text[choose.randrange(len(text))] = choose.randrange(256)
        assert isinstance(parse_id(bytes(text[: choose.randrange(len(text) + 1)])), str | None)


def _make_strangers(place: _Place) -> None:
    (place.registered / id_hash("directory")).mkdir()
    os.mkfifo(place.registered / id_hash("fifo"))
    (place.registered / id_hash("link")).symlink_to("nowhere")
    (place.registered / id_hash("cut")).write_bytes(b'{"transfer_id"')
    (place.registered / "new-0").write_bytes(b"{}")


def test_strangers_keep_no_registration_from_being_found_or_pruned(
    place: _Place, caplog: pytest.LogCaptureFixture
) -> None:
    place.store("a", "b")
    _make_strangers(place)

    assert (place.ids(), place.files.count()) == (["a", "b"], 2)
    place.files.prune(lambda _: False)
    assert place.ids() == ["a", "b"]
    assert id_hash("cut") not in os.listdir(place.registered)
    assert [r.levelname for r in caplog.records if r.name == module.__name__] == ["WARNING"]


def test_strangers_keep_no_server_from_starting(
    place: _Place, caplog: pytest.LogCaptureFixture
) -> None:
    place.store("a")
    _make_strangers(place)
    place.files.recover()

    assert sorted(os.listdir(place.registered)) == sorted([id_hash("a"), id_hash("directory")])
    assert [r.levelname for r in caplog.records if r.name == module.__name__] == ["WARNING"]


def test_a_record_of_use_that_cannot_be_opened_spoils_no_count_and_no_list(place: _Place) -> None:
    place.store("a", "b")
    path = place.activity / f"registered-{id_hash('a')}"
    path.unlink()
    path.mkdir()

    assert (place.files.count(), place.ids()) == (2, ["a", "b"])


def test_registering_without_room_is_an_error_of_ours_and_leaves_nothing(
    place: _Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    place.store("a")
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(StateFull, match="No space left"):
            place.store("b")
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", full)
        with pytest.raises(StateFull, match="the registrations cannot be used now: No space left"):
            place.store("b")

    assert os.listdir(place.registered) == [id_hash("a")]
    place.store("b")
    assert place.ids() == ["a", "b"]


def test_a_lock_that_is_never_let_go_is_an_error_not_a_hang(
    place: _Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LOCK_SECONDS", 0.01)
    stopped = open_private(str(place.registered.parent), "registered.lock")
    fcntl.flock(stopped, fcntl.LOCK_EX)

    for change in (lambda: place.store("a"), lambda: place.files.remove("a")):
        with pytest.raises(StateUnavailable, match="another process holds its guard"):
            change()
    os.close(stopped)
    place.store("a")
