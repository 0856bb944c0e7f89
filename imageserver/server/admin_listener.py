# SPDX-License-Identifier: Apache-2.0
"""The admin listener among a worker's sockets: which they are, who may connect, what is served.

The master binds its addresses with all others, so gunicorn hands them over in an upgrade and
closes them on stop; every worker accepts from them. They speak plain HTTP, have threads of
their own (``pools``), and are not spread over the workers (``accepting``).
"""

import contextlib
import os
import socket
from collections.abc import Mapping
from typing import Any

from gunicorn.util import parse_address

from imageserver.core.entry import Exposition
from imageserver.core.recent import Recently, Touched, all_touched
from imageserver.observability.metrics.shown import Sources, exposition, refusals_in
from imageserver.observability.recent import ended_in, touched_in
from imageserver.process import Process
from imageserver.server.credentials import peer_of
from imageserver.server.readiness import checks
from imageserver.settings import Settings
from imageserver.web.admin_app import AdminSources, create_admin_app
from imageserver.web.admin_status import Books
from imageserver.web.app import App

#: The settings that ``/status`` tells.
_LIMITS = ("max_readers", "max_writers", "max_readers_per_image", "max_writers_per_image")


def admin_name(listener: Any, addresses: tuple[str, ...]) -> object:
    """Return the name (getsockname(2)) of an admin listener, None of any other.

    An inherited listener has only its socket's name. One that this master has bound also has the
    address of the settings, which is compared first: a host's name may have another address now.
    """
    name = listener.getsockname()
    for address in addresses:
        bound = parse_address(bindable(address))
        if bound == getattr(listener, "cfg_addr", None) or name in _names(bound):
            return name
    return None


def bindable(address: str) -> str:
    """Return an address of the settings as gunicorn takes it."""
    return address.replace("unix:@", "unix:\0")


def _names(bound: object) -> list[object]:
    if not isinstance(bound, tuple):
        path = str(bound)
        return [os.fsencode(path) if path.startswith("\0") else path]
    host, port = bound
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with contextlib.suppress(OSError):
        return [found[4] for found in socket.getaddrinfo(host, port, family, socket.SOCK_STREAM)]
    return []


def admit(peer: socket.socket) -> bool:
    """Tell whether a client may connect: to a Unix socket, root and the server's user.

    The socket's mode says the same, but is set only after the bind; an abstract socket has none.
    """
    if peer.family != socket.AF_UNIX:
        return True
    return peer_of(peer).uid in {0, os.geteuid()}


def admin_application(process: Process, *, full_ids: bool) -> App:
    """Build the application of an admin listener."""
    settings, slots = process.settings, process.slots
    proofs = checks(settings, process.files, slots, process.runtime)
    limits, image_limits = process.slot_limits, process.image_limits
    sources = Sources(settings.metrics_dir, slots, limits, image_limits, settings.threads, proofs)

    def metrics() -> Exposition:
        process.metrics.flush()
        return exposition(sources)

    def recently() -> Recently:
        process.recent.flush()
        return ended_in(settings.metrics_dir)

    def refusals() -> Mapping[str, int]:
        process.metrics.flush()
        return refusals_in(settings.metrics_dir)

    def touched() -> Mapping[str, Touched]:
        process.recent.flush()
        return all_touched(touched_in(settings.metrics_dir))

    told = {name: getattr(settings, name) for name in _LIMITS}
    books = Books(slots, told, recently, refusals, touched)
    admin = AdminSources(books, process.look_up, process.mapper, proofs, metrics)
    hosts = None if full_ids else names_of_host(settings)
    return create_admin_app(admin, hosts, full_ids=full_ids)


def names_of_host(settings: Settings) -> set[str]:
    """Return the names under which admin listeners may be asked, beside addresses."""
    bound = (address.rpartition(":")[0] for address in settings.admin_bind)
    return {socket.gethostname(), *bound, *settings.admin_hosts}


# In the master


def restrict(address: str) -> None:
    """Set a Unix socket's mode: only its owner may connect."""
    path = address.removeprefix("unix:")
    if path.startswith("/"):
        os.chmod(path, 0o600)
