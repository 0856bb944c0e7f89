# SPDX-License-Identifier: Apache-2.0
"""Listening sockets that systemd has made and passed on (sd_listen_fds(3)).

gunicorn takes them in place of its ``bind``, whatever they are. So they are compared first: an
address that is missing would not be served, and one too many would be taken for HTTP.
"""

import fcntl
import os
import socket
from collections.abc import Iterable
from typing import Any

#: SD_LISTEN_FDS_START
_FIRST = 3


class WrongSockets(Exception):
    """The sockets passed are not the addresses of the settings; ``str()`` is a sentence."""


def is_activated() -> bool:
    """Tell whether systemd has passed sockets to this process."""
    return "LISTEN_FDS" in os.environ and os.environ.get("LISTEN_PID") == str(os.getpid())


def check(addresses: Iterable[object]) -> None:
    """Compare the sockets passed with gunicorn's addresses: paths and (host, port) pairs.

    Raises:
        WrongSockets: they differ.
    """
    passed = {_name_of(fd) for fd in range(_FIRST, _FIRST + int(os.environ["LISTEN_FDS"]))}
    wanted = {_text(address) for address in addresses}
    if passed != wanted:
        raise WrongSockets(
            f"systemd has passed {_listed(passed)}, but the settings name {_listed(wanted)}; "
            "make ListenStream= of imageserver.socket and the settings agree"
        )


def pass_on(listeners: Iterable[Any]) -> None:
    """Number sockets as a successor that is executed next expects them.

    gunicorn tells it that they are there, but has itself moved them to other numbers.
    """
    fds = [listener.fileno() for listener in listeners]
    copies = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIRST + len(fds)) for fd in fds]
    for fd in fds:
        os.set_inheritable(fd, False)  # noqa: FBT003 - its signature
    for number, copy in enumerate(copies, _FIRST):
        os.dup2(copy, number)


def _name_of(fd: int) -> str:
    with socket.socket(fileno=os.dup(fd)) as sock:
        return _text(sock.getsockname())


def _text(address: Any) -> str:
    if isinstance(address, tuple):
        host, port = address[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    path = address if isinstance(address, str) else os.fsdecode(address)
    return "unix:" + path.replace("\0", "@", 1)


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names))
