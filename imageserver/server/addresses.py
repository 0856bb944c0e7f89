# SPDX-License-Identifier: Apache-2.0
"""The addresses to listen at: each is named once, and is free. The files of Unix sockets.

gunicorn would try an address in use for 5 s, with 11 log lines, and would replace the Unix socket
of a running server silently.
"""

import contextlib
import errno
import logging
import os
import socket
import stat
from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import Any

from imageserver.runtime.private import OURS
from imageserver.server import activation
from imageserver.server.admin_listener import bindable
from imageserver.server.control import UnusableSocket, check_socket, take_over
from imageserver.settings import Settings

log = logging.getLogger(__name__)

_ADMIN, _CONTROL, _IMAGES = (
    "IMAGESERVER_ADMIN_BIND",
    "IMAGESERVER_CONTROL_SOCKET",
    "IMAGESERVER_BIND",
)
_LISTEN = "0A"  # TCP_LISTEN, as /proc/net/tcp writes it
_ANY = {"0.0.0.0", "::"}  # noqa: S104 - to compare with
_BINDV6ONLY = "/proc/sys/net/ipv6/bindv6only"
_UNPRIVILEGED = 1024  #: unless ip_unprivileged_port_start (ip-sysctl) says less


class UnusableAddress(Exception):
    """An address cannot be listened at; ``str()`` is a sentence that names the variable."""


def check(settings: Settings) -> None:
    """Prove that no address is named twice, however it is spelt, and that sockets can be made.

    A running server may have a port: a host is tried with one that is free, and of a port below
    1024 only whether this user may bind it.

    Raises:
        UnusableAddress: it is, or they cannot.
    """
    for variable, path in _sockets(settings):
        _refuse_own(variable, path, settings.runtime_dir)
        # systemd may have made one for images in a directory where this user cannot.
        if variable != _IMAGES or not _is_socket(path):
            _check_socket(variable, path)
    for variable, address in _named(settings):
        _check_host(variable, address)
        if not (address.startswith("unix:") or is_handed_over()):
            with contextlib.ExitStack() as bound:
                _bind(bound, variable, address, any_port=True)
                _check_privilege(variable, address)
    for (other, first), (variable, second) in combinations(_named(settings), 2):
        if _overlap(_names(first), _names(second)):
            raise UnusableAddress(
                f"{variable}: {second} is an address of {other} already ({first}); choose another"
            )


def check_free(settings: Settings) -> None:
    """Prove that no process listens at any of them; wait 2 s for the workers of a dead server.

    Raises:
        UnusableAddress: a process does, or an address does not belong to this host.
    """
    for variable, path in _sockets(settings):
        _check_socket(variable, path)
        try:
            take_over(path)
        except UnusableSocket as exc:
            raise UnusableAddress(f"{variable}: {exc}".replace("\0", "@")) from exc
    with contextlib.ExitStack() as bound:  # all at once: [::] may include 127.0.0.1
        for variable, address in _named(settings):
            if not address.startswith("unix:"):
                _bind(bound, variable, address)


def files_of(listeners: Iterable[Any]) -> dict[str, os.stat_result]:
    """Return the files of Unix sockets by path, of those that are there."""
    found = {}
    for listener in listeners:
        path = listener.getsockname()
        if isinstance(path, str):
            try:
                found[path] = os.stat(path, follow_symlinks=False)
            except OSError as exc:  # removed, while an upgrade was under way
                log.warning("nobody can connect to %s: %s", path, exc.strerror)
    return found


def remove_files(made: Mapping[str, os.stat_result]) -> None:
    """Remove files of sockets, where they are still the ones that were made."""
    for path, file in made.items():
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(path, follow_symlinks=False), file):
                os.unlink(path)


def is_handed_over() -> bool:
    """Tell whether the running server, or systemd, hands its sockets over to this process."""
    return activation.is_activated() or {"GUNICORN_PID", "GUNICORN_FD"} <= os.environ.keys()


def _named(settings: Settings) -> list[tuple[str, str]]:
    """Return every address by its variable."""
    of = {
        _IMAGES: settings.bind,
        _CONTROL: settings.control_address,
        _ADMIN: settings.admin_bind,
    }
    return [(variable, address) for variable, addresses in of.items() for address in addresses]


def _sockets(settings: Settings) -> list[tuple[str, str]]:
    """Return the Unix sockets by variable: a path, or NUL and a name."""
    return [
        (variable, bindable(address).removeprefix("unix:"))
        for variable, address in _named(settings)
        if address.startswith("unix:")
    ]


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except (OSError, ValueError):  # none, or an abstract one
        return False


def _check_socket(variable: str, path: str) -> None:
    try:
        if not path.startswith("\0"):
            check_socket(path)
    except UnusableSocket as exc:
        raise UnusableAddress(f"{variable}: {exc}") from exc


def _check_host(variable: str, address: str) -> None:
    try:
        if not address.startswith("unix:"):
            _parsed(address)[1].encode("idna")
    except UnicodeError as exc:  # a label of more than 63 letters, or of none
        raise UnusableAddress(
            f"{variable}: {address} cannot be used (no name of a host); choose another address"
        ) from exc


def _refuse_own(variable: str, path: str, runtime_dir: str) -> None:
    """Refuse a socket in place of the runtime directory, or of what the server has in there."""
    if path.startswith("\0"):
        return
    name, own = os.path.realpath(path), os.path.realpath(runtime_dir)
    if name == own or (os.path.dirname(name) == own and os.path.basename(name) in OURS):
        raise UnusableAddress(f"{variable}: {path} is IMAGESERVER_RUNTIME_DIR's; choose another")


def _check_privilege(variable: str, address: str) -> None:
    """Prove that a port below 1024 may be bound: whoever has it now does not matter."""
    family, host, port = _parsed(address)
    if not 0 < port < _UNPRIVILEGED:
        return
    try:
        with socket.socket(family) as probe:
            probe.bind((host, port))
    except PermissionError as exc:
        raise UnusableAddress(
            f"{variable}: {address} cannot be used ({exc.strerror}); {_remedy(exc, port)}"
        ) from exc
    except OSError:
        pass


def _names(address: str) -> set[tuple[str, str]]:
    """Return what an address stands for: a host's numbers with the port, or a socket's file."""
    if address.startswith("unix:/"):
        directory, name = os.path.split(address.removeprefix("unix:"))
        return {(os.path.realpath(directory), f"unix:{name}")}
    if address.startswith("unix:"):
        return {("", address)}
    family, host, port = _parsed(address)
    if port == 0:
        return set()  # the kernel chooses one at each bind
    with contextlib.suppress(OSError):  # an unknown name is refused when it is bound
        found = socket.getaddrinfo(host, port, family, socket.SOCK_STREAM)
        return {(str(name[0]), str(port)) for *_, name in found}
    return set()


def _overlap(some: set[tuple[str, str]], others: set[tuple[str, str]]) -> bool:
    """Tell whether two addresses are one, or one of them stands for the other as well."""
    return any(
        port == other_port and (host == other_host or _includes(host, other_host))
        for host, port in some
        for other_host, other_port in others
    )


def _includes(host: str, other: str) -> bool:
    """Tell whether one of two hosts' numbers stands for any address, the other one among them."""
    if (":" in host) == (":" in other):
        return not _ANY.isdisjoint({host, other})
    return "::" in {host, other} and not _is_ipv6_apart()


def _is_ipv6_apart() -> bool:
    """Tell whether ``[::]`` leaves IPv4 alone (ip-sysctl, ``bindv6only``)."""
    try:
        with open(_BINDV6ONLY, encoding="ascii") as file:
            return file.read().strip() == "1"
    except OSError:
        return True


def _parsed(address: str) -> tuple[int, str, int]:
    host, _, port = address.rpartition(":")
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    return family, host.strip("[]"), int(port)


def _bind(
    bound: contextlib.ExitStack, variable: str, address: str, *, any_port: bool = False
) -> None:
    family, host, port = _parsed(address)
    try:
        probe = bound.enter_context(socket.socket(family))
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, 0 if any_port else port))
        probe.listen()
    except OSError as exc:
        raise UnusableAddress(
            f"{variable}: {address} cannot be used ({exc.strerror}); {_remedy(exc, port)}"
        ) from exc


def _remedy(exc: OSError, port: int) -> str:
    if exc.errno == errno.EACCES:
        return "choose a port above 1023, or give the server CAP_NET_BIND_SERVICE"
    if exc.errno == errno.EADDRNOTAVAIL or isinstance(exc, socket.gaierror):
        return "choose an address of this host, as 'ip address' lists them"
    if exc.errno != errno.EADDRINUSE:
        return "choose another address"
    states = _states_at(port)
    if states and _LISTEN not in states:
        return (
            "an outgoing connection of this host has taken the port; wait until it has ended, "
            "and reserve the port: sysctl net.ipv4.ip_local_reserved_ports"
        )
    return "stop what listens there or choose another address"


def _states_at(port: int) -> set[str]:
    """Return the states of the TCP sockets that have this local port (proc(5), /proc/net/tcp)."""
    rows: list[list[str]] = []
    for name in ("tcp", "tcp6"):
        with (
            contextlib.suppress(OSError),  # no IPv6, or no /proc: nothing is known
            open(f"/proc/self/net/{name}", encoding="ascii") as table,
        ):
            rows += [line.split() for line in table.readlines()[1:]]
    return {row[3] for row in rows if int(row[1].rpartition(":")[2], 16) == port}
