# SPDX-License-Identifier: Apache-2.0
"""The control socket: accept a peer, check its user, read one request, answer (docs/api.md).

The master binds the socket with all others, so gunicorn hands it over in an upgrade and
closes it on stop; every worker's loop accepts from it. Each peer has a thread of its own, which
may wait; none of these threads serves HTTP. A peer that is slow or silent keeps its thread for
the client timeout at most; one that waits for the end of a transfer, until it disconnects.
"""

import contextlib
import errno
import logging
import os
import select
import socket
import stat
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from imageserver.backends.table import KINDS
from imageserver.core import control_protocol
from imageserver.core.control_protocol import MAX_REQUEST, InvalidCommand
from imageserver.core.entry import fields
from imageserver.core.errors import NO_DESCRIPTOR, StateUnavailable
from imageserver.core.transfer import is_valid_id
from imageserver.server.credentials import peer_of
from imageserver.server.loop import Loop
from imageserver.server.threads import NoThread, Threads
from imageserver.server.wire import wait
from imageserver.transfers.actions import Administration

log = logging.getLogger(__name__)

#: Peers that a worker serves at once; threads are made when first needed.
_MAX_PEERS = 64
#: How long a peer that was refused early may go on sending, so that it gets to read the answer.
_LINGER_SECONDS = 1.0
#: ... and how many times the largest request it may send, 64 MiB in all.
_LINGER_READS = 512
#: How long the workers of a server that was killed may take to close the socket.
_TAKEOVER_SECONDS = 2.0


class UnusableSocket(Exception):
    """The control socket cannot be made; ``str()`` is a sentence."""


class ControlServer:
    """The control socket of a worker; ``listen`` and ``stop`` on the loop's thread."""

    def __init__(
        self,
        administration: Administration,
        timeout: float,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """``timeout``: seconds in which a peer must have sent its request, or taken the answer."""
        self._administration = administration
        self._timeout = timeout
        self._now = now
        self._threads = Threads("control", _MAX_PEERS)
        self._listener: Any = None
        self._loop: Loop
        self._peers: set[socket.socket] = set()
        #: Peers whose request has not arrived.
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
        """Disconnect the peers whose request has not arrived."""
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
        if len(self._peers) >= _MAX_PEERS:
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
        linger = _LINGER_SECONDS
        try:
            peer = peer_of(sock)
            if peer.may_control(os.geteuid(), os.getegid()):
                linger = self._serve_one(sock)
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
            _hang_up(sock, linger)
            self._peers.discard(sock)

    def _serve_one(self, sock: socket.socket) -> float:
        """Read and answer one request; return for how many seconds the peer may go on sending."""
        linger = _LINGER_SECONDS
        try:
            text = self._request(sock)
            linger = 0.0
            self._silent.discard(sock)
            command = control_protocol.parse_command(text, KINDS)
        except InvalidCommand as exc:
            answer = control_protocol.failed(str(exc))
        else:
            answer = self._carry_out(command, sock)
            _log(command, answer)
        self._send_all(sock, answer)
        return linger

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
        """Return what arrives up to the first newline, or the end.

        Raises:
            InvalidCommand: it is too large, or takes too long.
        """
        deadline = self._now() + self._timeout
        text = b""
        while True:
            if not wait(sock, select.POLLIN, deadline - self._now()):
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
        deadline = self._now() + self._timeout
        rest = memoryview(answer)
        while rest and wait(sock, select.POLLOUT, deadline - self._now()):
            rest = rest[sock.send(rest) :]


def _log(command: control_protocol.Command, answer: bytes) -> None:
    if isinstance(command, control_protocol.List):  # its answer would fill the log
        log.debug("control: list", extra=fields(after=command.after))
        return
    level = logging.DEBUG if isinstance(command, control_protocol.Status) else logging.INFO
    if isinstance(command, control_protocol.Register) and command.transfer.ignored:
        level = logging.WARNING  # the answer has them
    log.log(level, "control: %s", answer.decode().rstrip(), extra=_fields(command))


def _fields(
    command: control_protocol.Status | control_protocol.Register | control_protocol.Unregister,
) -> dict[str, Mapping[str, object]]:
    action = type(command).__name__.lower()
    if isinstance(command, control_protocol.Register):
        return fields(action=action, transfer=command.transfer.id)
    name = command.transfer_id
    if name is not None and not is_valid_id(name):
        name = control_protocol.shown(name)
    return fields(action=action, transfer=name)


def _has_gone(sock: socket.socket) -> bool:
    """Tell whether the peer has closed its socket, not only its sending direction."""
    poller = select.poll()
    poller.register(sock, 0)
    return bool(poller.poll(0))


def _send(sock: socket.socket, answer: bytes) -> None:
    with contextlib.suppress(OSError):  # the peer has gone
        sock.send(answer)  # smaller than any socket's buffer, into an empty one: never partial


def _refuse(sock: socket.socket) -> None:
    _send(sock, control_protocol.failed("server busy"))
    sock.close()


def _hang_up(sock: socket.socket, linger: float) -> None:
    """Close, after reading what arrives within ``linger`` seconds.

    A socket that is closed with unread bytes is reset: the peer would not get the answer.
    """
    deadline = time.monotonic() + linger
    with contextlib.suppress(OSError), sock:
        sock.shutdown(socket.SHUT_WR)
        for _ in range(_LINGER_READS):
            left = deadline - time.monotonic()
            if not (wait(sock, select.POLLIN, left) and sock.recv(MAX_REQUEST)):
                break


# In the master


def check_socket(path: str) -> None:
    """Check that the socket can be made, or exists.

    Raises:
        UnusableSocket: it cannot.
    """
    directory = os.path.dirname(path)
    if not os.access(directory, os.W_OK | os.X_OK):
        raise UnusableSocket(f"{directory} is no directory where this user can make a socket")
    if os.path.lexists(path) and not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise UnusableSocket(f"{path} is not a socket; remove it or choose another path")


def take_over(path: str) -> None:
    """Wait until the workers of a killed server have closed the socket; gunicorn replaces the file.

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


def allow_group(path: str) -> None:
    """Set the socket's mode: its owner and its group may connect."""
    os.chmod(path, 0o660)
