# SPDX-License-Identifier: Apache-2.0
"""Connections of dead clients, seen through the kernel on real Unix sockets."""

import contextlib
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from imageserver.backends.nbd import peers
from imageserver.backends.nbd.peers import crowded, has_orphans


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory with a short path: Unix sockets have 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="is-") as name:
        yield Path(name)


@contextlib.contextmanager
def _connected(path: Path, through: Path | None = None) -> Iterator[list[socket.socket]]:
    """Yield (client's end, server's end) of a connection to a server listening at ``path``."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(through or path))
            server, _ = listener.accept()
            with server:
                yield [client, server]


def test_a_living_connection_is_no_orphan(place: Path) -> None:
    with _connected(place / "s"):
        assert not has_orphans(str(place / "s"))


def test_a_connection_whose_client_has_gone_is_an_orphan(place: Path) -> None:
    with _connected(place / "s") as (client, _):
        client.close()

        assert has_orphans(str(place / "s"))


def test_an_orphan_is_one_until_the_server_has_closed_it(place: Path) -> None:
    with _connected(place / "s") as (client, server):
        client.sendall(b"last words")
        client.close()
        found = [has_orphans(str(place / "s"))]
        server.recv(100)
        found.append(has_orphans(str(place / "s")))
        server.close()
        found.append(has_orphans(str(place / "s")))

    assert found == [True, True, False]


def test_a_client_that_has_only_shut_its_side_may_still_listen(place: Path) -> None:
    with _connected(place / "s") as (client, _):
        client.shutdown(socket.SHUT_WR)

        assert not has_orphans(str(place / "s"))


def test_another_servers_orphans_do_not_count(place: Path) -> None:
    with _connected(place / "a"), _connected(place / "b") as (client, _):
        client.close()

        assert [has_orphans(str(place / name)) for name in "ab"] == [False, True]


def test_one_orphan_among_the_living_is_found(place: Path) -> None:
    with _connected(place / "s") as (client, _), socket.socket(socket.AF_UNIX) as other:
        with contextlib.suppress(ConnectionRefusedError):
            other.connect(str(place / "s"))
        client.close()

        assert has_orphans(str(place / "s"))


def test_a_renamed_socket_is_followed(place: Path) -> None:
    with _connected(place / "old") as (client, _):
        os.rename(place / "old", place / "new")
        client.close()

        assert has_orphans(str(place / "new"))


def test_a_socket_reached_through_a_link_is_followed(place: Path) -> None:
    (place / "link").symlink_to("real")
    with _connected(place / "real", through=place / "link") as (client, _):
        client.close()

        assert has_orphans(str(place / "link"))


def test_a_socket_reached_through_a_linked_directory_is_followed(place: Path) -> None:
    (place / "real").mkdir()
    (place / "link").symlink_to("real")
    with _connected(place / "real" / "s") as (client, _):
        client.close()

        assert has_orphans(str(place / "link" / "s"))


def test_a_new_server_at_the_path_is_told_from_the_one_that_was_moved_away(place: Path) -> None:
    (place / "aside").mkdir()
    with _connected(place / "aside" / "s") as (client, _), _connected(place / "s"):
        client.close()

        assert not has_orphans(str(place / "s"))


def test_the_old_servers_orphans_are_seen_through_a_link_to_the_new_one(place: Path) -> None:
    """They have the path at which the old server was bound, and no inode that is there now."""
    (place / "link").symlink_to("real")
    with _connected(place / "real") as (client, _):
        client.close()
        (place / "real").unlink()
        with _connected(place / "real"):
            assert has_orphans(str(place / "link"), bytes(place / "real"))
            assert not has_orphans(str(place / "link"))  # where links lead was not looked up


def test_where_there_is_no_socket_it_cannot_be_told(place: Path) -> None:
    """The socket may have been moved away for a moment, and its orphans with it."""
    with _connected(place / "s") as (client, _):
        client.close()
        (place / "s").rename(place / "aside")
        with pytest.raises(FileNotFoundError):
            has_orphans(str(place / "s"))


def test_whether_the_kernel_tells_of_sockets_can_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    peers.require_sock_diag()
    monkeypatch.setattr(peers, "_SOCK_DIAG_BY_FAMILY", 9999)
    with pytest.raises(OSError, match="sock_diag"):
        peers.require_sock_diag()


def test_ever_so_many_connections_are_looked_through(place: Path) -> None:
    with contextlib.ExitStack() as held:
        listener = held.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(place / "s"))
        listener.listen(200)
        clients = []
        for _ in range(200):
            client = held.enter_context(socket.socket(socket.AF_UNIX))
            client.connect(str(place / "s"))
            held.enter_context(listener.accept()[0])
            clients.append(client)
        found = [has_orphans(str(place / "s"))]
        clients[-1].close()
        found.append(has_orphans(str(place / "s")))

    assert found == [False, True]


def test_no_descriptor_is_left_open(place: Path) -> None:
    with _connected(place / "s"):
        before = os.listdir("/proc/self/fd")
        has_orphans(str(place / "s"))

        assert os.listdir("/proc/self/fd") == before


def test_a_kernel_that_refuses_is_an_error_not_an_answer(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "_SOCK_DIAG_BY_FAMILY", 9999)

    with _connected(place / "s"), pytest.raises(OSError, match="sock_diag"):
        has_orphans(str(place / "s"))


# Who waits to be let in


def test_a_client_that_is_not_let_in_crowds_a_server(place: Path) -> None:
    stamps = {}
    with contextlib.ExitStack() as opened:
        listeners = {}
        for name in "ab":
            listeners[name] = opened.enter_context(socket.socket(socket.AF_UNIX))
            listeners[name].bind(str(place / name))
            listeners[name].listen()
            found = os.stat(place / name)
            stamps[name] = found.st_dev, found.st_ino, found.st_ctime_ns
        servers = list(stamps.values())
        seen = [crowded(servers)]
        client = opened.enter_context(socket.socket(socket.AF_UNIX))
        client.connect(str(place / "b"))
        seen += [crowded(servers), crowded([stamps["a"]]), crowded([])]
        opened.enter_context(listeners["b"].accept()[0])
        seen.append(crowded(servers))

    assert seen == [set(), {stamps["b"]}, set(), set(), set()]


def test_where_the_kernel_does_not_answer_no_server_is_crowded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(*_: object) -> socket.socket:
        raise PermissionError

    monkeypatch.setattr(socket, "socket", refused)
    assert crowded([(1, 2, 3)]) == set()
