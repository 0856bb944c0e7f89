# SPDX-License-Identifier: Apache-2.0
"""The control socket: peers accepted, asked who they are, heard, answered (docs/api.md).

The master binds the socket with all others, so gunicorn hands it over in an upgrade and
closes it on stop; every worker's loop accepts from it. What follows may wait, so each peer
has a thread of its own, none of which ever serves HTTP. A peer that is slow or silent keeps
its thread for the client timeout at most; one that waits for the end of a transfer, until it
hangs up.
"""

import contextlib
import errno
import logging
import os
import select
import socket
import stat
import struct
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from imageserver.core import control_protocol
from imageserver.core.control_protocol import MAX_REQUEST, InvalidCommand, Peer
from imageserver.core.entry import fields
from imageserver.core.errors import NO_DESCRIPTOR, StateUnavailable
from imageserver.server.loop import Loop
from imageserver.server.threads import NoThread, Threads
from imageserver.transfers.actions import Administration

log = logging.getLogger(__name__)

#: Peers that a worker serves at once; threads are made when first needed.
_PEERS = 64
#: A peer that was refused before it had said all may go on for so long, to get the answer.
_LINGER_SECONDS = 1.0
#: ... and say no more than so many times the largest request, 64 MiB.
_LINGER_READS = 512
#: struct ucred (unix(7)): pid, uid, gid.
_UCRED = struct.Struct("=iII")
#: asm-generic/socket.h; as many groups as ``socket.getsockopt`` has room for.
_SO_PEERGROUPS = 59
_GROUPS_SIZE = 1024
#: How long the workers of a server that was killed may take to let the socket go.
_TAKEOVER_SECONDS = 2.0


class UnusableSocket(Exception):
    """The control socket cannot be made; ``str()`` is a sentence."""


class ControlServer:
    """What a worker does for the control socket; ``listen`` and ``stop`` on the loop's thread."""

    def __init__(self, administration: Administration, timeout: float) -> None:
        self._administration = administration
        self._timeout = timeout
        self._threads = Threads("control", _PEERS)
        self._listener: Any = None
        self._loop: Loop
        self._peers: set[socket.socket] = set()
        self._silent: set[socket.socket] = set()

    def listen(self, listener: Any, loop: Loop) -> None:
        """Accept from the listening socket."""
        listener.setblocking(0)
        self._listener, self._loop = listener, loop
        loop.watch(listener.fileno(), self._accept)

    def is_empty(self) -> bool:
        """Tell whether no peer is left."""
        return not self._peers

    def stop(self) -> None:
        """Accept no more."""
        listener, self._listener = self._listener, None
        if listener is not None:
            self._loop.forget(listener.fileno())
            listener.close()

    def close_silent(self) -> None:
        """Hang up on those who have not asked for anything yet."""
        for sock in list(self._silent):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as exc:
            if exc.errno in NO_DESCRIPTOR:
                self._loop.free_descriptor(self._listener.fileno(), self._accept)
            return  # else another worker was quicker, or the peer has gone
        sock.settimeout(0)
        if len(self._peers) >= _PEERS:
            _refuse(sock)
            return
        self._peers.add(sock)
        self._silent.add(sock)
        try:
            self._threads.submit(partial(self._serve, sock), may_wait=False)
        except NoThread:
            self._silent.discard(sock)
            self._peers.discard(sock)
            _refuse(sock)

    # On a thread

    def _serve(self, sock: socket.socket) -> None:
        patience = _LINGER_SECONDS
        try:
            peer = _peer(sock)
            if peer.may_control(os.geteuid(), os.getegid()):
                patience = self._converse(sock)
            else:
                log.warning("control: refused: uid=%d", peer.uid)
                _send(sock, control_protocol.failed("permission denied"))
        except OSError:
            pass  # the peer has gone
        except Exception:
            log.exception("control: failed")
            _send(sock, control_protocol.failed("internal error"))
        finally:
            self._silent.discard(sock)
            _hang_up(sock, patience)
            self._peers.discard(sock)

    def _converse(self, sock: socket.socket) -> float:
        """Hear and answer one request; return for how long the peer may go on after that."""
        patience = _LINGER_SECONDS
        try:
            text = self._request(sock)
            patience = 0.0
            self._silent.discard(sock)
            command = control_protocol.parse_command(text)
        except InvalidCommand as exc:
            answer = control_protocol.failed(str(exc))
        else:
            answer = self._carry_out(command, sock)
            _report(command, answer)
        self._send_all(sock, answer)
        return patience

    def _carry_out(self, command: control_protocol.Command, sock: socket.socket) -> bytes:
        try:
            return self._administration.run(command, lambda: not _has_gone(sock))
        except StateUnavailable as exc:
            log.warning("control: refused: %s", exc)
            return control_protocol.failed(f"server state unavailable: {exc}")
        except OSError:  # not the peer's, who would go without an answer
            log.exception("control: failed")
            return control_protocol.failed("internal error")

    def _request(self, sock: socket.socket) -> bytes:
        """Return what comes up to the first newline, or the end."""
        deadline = time.monotonic() + self._timeout
        text = b""
        while True:
            if not _wait(sock, select.POLLIN, deadline - time.monotonic()):
                raise InvalidCommand("request took too long")
            data = sock.recv(MAX_REQUEST)
            line, newline, _ = data.partition(b"\n")
            text += line
            if len(text) > MAX_REQUEST:
                raise InvalidCommand(f"request is larger than {MAX_REQUEST} bytes")
            if newline or not data:
                return text

    def _send_all(self, sock: socket.socket, answer: bytes) -> None:
        """Send an answer, of which a list may be larger than the socket's buffer."""
        deadline = time.monotonic() + self._timeout
        rest = memoryview(answer)
        while rest and _wait(sock, select.POLLOUT, deadline - time.monotonic()):
            rest = rest[sock.send(rest) :]


def _report(command: control_protocol.Command, answer: bytes) -> None:
    if isinstance(command, control_protocol.List):  # its answer would fill the log
        log.debug("control: list", extra=fields(after=command.after))
        return
    level = logging.DEBUG if isinstance(command, control_protocol.Status) else logging.INFO
    if isinstance(command, control_protocol.Register) and command.transfer.ignored:
        level = logging.WARNING  # the answer has them
    log.log(level, "control: %s", answer.decode().rstrip(), extra=_told(command))


def _told(
    command: control_protocol.Status | control_protocol.Register | control_protocol.Unregister,
) -> dict[str, Mapping[str, object]]:
    action = type(command).__name__.lower()
    if isinstance(command, control_protocol.Register):
        return fields(action=action, transfer=command.transfer.id)
    return fields(action=action, transfer=command.transfer_id)


def _peer(sock: socket.socket) -> Peer:
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    _, uid, gid = _UCRED.unpack(credentials)
    try:
        groups = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_SIZE)
    except OSError:  # more groups than fit: the first one must do
        groups = b""
    return Peer(uid, frozenset({gid, *struct.unpack(f"={len(groups) // 4}I", groups)}))


def _wait(sock: socket.socket, events: int, seconds: float) -> bool:
    poller = select.poll()
    poller.register(sock, events)
    return bool(poller.poll(max(0.0, seconds) * 1000))


def _has_gone(sock: socket.socket) -> bool:
    """Tell whether the peer has closed its socket; one that has said all has not."""
    poller = select.poll()
    poller.register(sock, 0)
    return bool(poller.poll(0))


def _send(sock: socket.socket, answer: bytes) -> None:
    with contextlib.suppress(OSError):  # a peer that is gone gets none
        sock.send(answer)  # below any socket buffer, into an empty one: never partial


def _refuse(sock: socket.socket) -> None:
    _send(sock, control_protocol.failed("server busy"))
    sock.close()


def _hang_up(sock: socket.socket, patience: float) -> None:
    """Close, but not on what the peer still says: it would not get to read the answer."""
    deadline = time.monotonic() + patience
    with contextlib.suppress(OSError), sock:
        sock.shutdown(socket.SHUT_WR)
        for _ in range(_LINGER_READS):
            left = deadline - time.monotonic()
            if not (_wait(sock, select.POLLIN, left) and sock.recv(MAX_REQUEST)):
                break


# In the master


def check_socket(path: str) -> None:
    """Prove that the socket can be made, or is there.

    Raises:
        UnusableSocket: it cannot.
    """
    directory = os.path.dirname(path)
    if not os.access(directory, os.W_OK | os.X_OK):
        raise UnusableSocket(f"{directory} is no directory where this user can make a socket")
    if os.path.lexists(path) and not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise UnusableSocket(f"{path} is not a socket; remove it or choose another path")


def take_over(path: str) -> None:
    """Wait for the workers of a dead predecessor; the file itself gunicorn replaces.

    Raises:
        UnusableSocket: a living server listens there.
    """
    deadline = time.monotonic() + _TAKEOVER_SECONDS
    while _is_served(path):
        if time.monotonic() > deadline:
            raise UnusableSocket(f"another server listens at {path}; stop it first")
        time.sleep(0.05)


def _is_served(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(0)
        found = probe.connect_ex(path)
    return found not in {errno.ENOENT, errno.ECONNREFUSED}


def open_to_group(path: str) -> None:
    """Give the socket its mode."""
    os.chmod(path, 0o660)
