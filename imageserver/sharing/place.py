# SPDX-License-Identifier: Apache-2.0
"""Where one run of ``share`` lives: a private directory, and an address of its own.

    DIRECTORY/  transfers/  state/  admin.sock  0.nbd  1.nbd ...    0700, removed at the end

A port is reserved by a socket that is bound and does not listen: with SO_REUSEADDR the server
binds beside it, and the kernel gives the port to nobody else.
"""

import contextlib
import ipaddress
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass

from imageserver.client.failures import LocalFailure

LOOPBACK = "127.0.0.1"
#: A socket's path has 107 bytes at most (unix(7)); the longest name in the directory.
_LONGEST_PATH, _LONGEST_NAME = 107, len("/admin.sock")
_PREFIX = "imageserver-share-"
#: Nothing is sent there: connecting a UDP socket chooses the address of this host (RFC 5737).
_ELSEWHERE = ("192.0.2.1", 9)


@contextlib.contextmanager
def private_directory() -> Iterator[str]:
    """Make a directory for this run; remove it.

    Raises:
        LocalFailure: it cannot be made, or its path is too long for sockets.
    """
    try:
        path = tempfile.mkdtemp(prefix=_PREFIX)
    except OSError as exc:
        raise LocalFailure(f"no directory can be made for this run: {exc.strerror}") from exc
    try:
        if len(os.fsencode(path)) + _LONGEST_NAME > _LONGEST_PATH:
            raise LocalFailure(f"{path} is too long for sockets: set TMPDIR to a shorter directory")
        for name in ("transfers", "state"):
            os.mkdir(os.path.join(path, name), mode=0o700)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def remove_for_certain(path: str) -> None:
    """Remove the directory of a run that was killed, although its qemu-nbds may just be ending."""
    deadline = time.monotonic() + 5
    while os.path.exists(path) and time.monotonic() < deadline:
        shutil.rmtree(path, ignore_errors=True)
        time.sleep(0.02)


@dataclass(frozen=True, slots=True)
class Address:
    """An address to serve at; ``holder`` keeps its port until the server listens."""

    host: str
    """As a URL has it: an IPv6 address in brackets."""
    port: int
    holder: socket.socket

    @classmethod
    def reserve(cls, text: str) -> "Address":
        """Reserve HOST:PORT, or HOST with a free port.

        Raises:
            LocalFailure: that is none, or cannot be had.
        """
        host, port = _split(text)
        family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
        holder = socket.socket(family)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            holder.bind((host.strip("[]"), port))
        except (OSError, UnicodeError) as exc:
            holder.close()
            why = getattr(exc, "strerror", None) or "no name of a host"
            raise LocalFailure(
                f"cannot listen at {host}:{port} ({why}): choose another --bind, "
                "or leave out the port to get a free one"
            ) from exc
        return cls(host, int(holder.getsockname()[1]), holder)

    @property
    def bind(self) -> str:
        """The address as the setting BIND has it."""
        return f"{self.host}:{self.port}"

    @property
    def reachable(self) -> str:
        """HOST:PORT for clients: of a wildcard, this host's address in its network."""
        host = self.host
        if host == "0.0.0.0":  # noqa: S104 - to compare with
            host = _own_address()
        elif host == "[::]":
            host = _own_address() if _own_address() != LOOPBACK else "[::1]"
        return f"{host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this host can connect."""
        with contextlib.suppress(OSError, ValueError):
            return ipaddress.ip_address(self.holder.getsockname()[0]).is_loopback
        return False


def _split(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or "]" in port:  # HOST, or [::1]
        host, port = text, "0"
    if text.count(":") > 1 and not text.startswith("["):  # a bare IPv6 address
        host, port = f"[{text}]", "0"
    if not host or "/" in text or not port.isascii() or not port.isdigit() or int(port) > 65535:  # noqa: PLR2004 - the last port
        raise LocalFailure(f"--bind {text!r} is wrong: it must be HOST, HOST:PORT or [IPV6]:PORT")
    return host, int(port)


def _own_address() -> str:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(_ELSEWHERE)
        return str(sock.getsockname()[0])
    return LOOPBACK
