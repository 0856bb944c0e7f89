# SPDX-License-Identifier: Apache-2.0
"""Listening sockets that systemd has made and passed on (sd_listen_fds(3)).

gunicorn listens at them in place of its ``bind`` and does not compare the two. So the server
does: a missing address would not be served, and at one too many gunicorn would speak HTTP.
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
    """Give sockets the descriptors at which the next master expects them: from 3 on.

    gunicorn passes their number to that master, but has moved the sockets to other descriptors.
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
