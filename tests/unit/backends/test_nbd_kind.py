# SPDX-License-Identifier: Apache-2.0
"""Where an image's socket is: a path without links is looked at once a second."""

import socket
from pathlib import Path

import pytest

from imageserver.backends.nbd import kind
from imageserver.backends.nbd.kind import NbdImage


class _Clock:
    """A module's time, which passes only when told, and the paths that were resolved."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.resolved: list[bytes] = []

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    made, resolve = _Clock(), kind.resolved_name

    def counted(name: bytes) -> bytes:
        made.resolved.append(name)
        return resolve(name)

    monkeypatch.setattr(kind, "time", made)
    monkeypatch.setattr(kind, "resolved_name", counted)
    monkeypatch.setattr(kind, "_straight", {})
    return made


def _listening(path: Path) -> socket.socket:
    return socket.create_server(str(path), family=socket.AF_UNIX)


def _at(path: Path) -> bytes:
    at = NbdImage(str(path)).pinned().at
    assert at
    return at


def test_a_path_without_links_is_resolved_once_a_second(clock: _Clock, tmp_path: Path) -> None:
    path = tmp_path / "nbd"
    with _listening(path):
        found = []
        for clock.now in (1000.0, 1000.9, 1001.0, 1001.9):
            found.append(_at(path))
    assert found == [bytes(path)] * 4
    assert clock.resolved == [bytes(path)] * 2


def test_a_path_with_links_is_resolved_each_time(clock: _Clock, tmp_path: Path) -> None:
    link = tmp_path / "link"
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        with _listening(tmp_path / name / "nbd"):
            link.unlink(missing_ok=True)
            link.symlink_to(name)
            assert _at(link / "nbd") == bytes(tmp_path / name / "nbd")
    assert len(clock.resolved) == 2


def test_another_socket_behind_a_new_link_is_seen_at_once(clock: _Clock, tmp_path: Path) -> None:
    path = tmp_path / "a" / "nbd"
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    with _listening(path), _listening(tmp_path / "b" / "nbd"):
        assert _at(path) == bytes(path)
        path.parent.rename(tmp_path / "old")
        path.parent.symlink_to("b")
        assert _at(path) == bytes(tmp_path / "b" / "nbd")


def test_the_same_socket_behind_a_new_link_is_seen_a_second_later(
    clock: _Clock, tmp_path: Path
) -> None:
    path = tmp_path / "a" / "nbd"
    path.parent.mkdir()
    with _listening(path):
        assert _at(path) == bytes(path)
        path.parent.rename(tmp_path / "b")
        path.parent.symlink_to("b")
        clock.now += 0.9
        assert _at(path) == bytes(path)  # which leads to the same socket
        clock.now += 0.2
        assert _at(path) == bytes(tmp_path / "b" / "nbd")


def test_what_is_not_there_is_remembered_by_nobody(clock: _Clock, tmp_path: Path) -> None:
    assert [_at(tmp_path / "nbd") for _ in range(2)] == [bytes(tmp_path / "nbd")] * 2
    assert len(clock.resolved) == 2
    assert kind._straight == {}


def test_paths_beyond_a_number_are_forgotten(
    clock: _Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kind, "_MOST_STRAIGHT", 2)
    path = tmp_path / "nbd"
    with _listening(path):
        for export in "abc":
            NbdImage(str(path), export).pinned()
    assert [image.export for image in kind._straight] == ["c"]
