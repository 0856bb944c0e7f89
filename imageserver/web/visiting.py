# SPDX-License-Identifier: Apache-2.0
"""A request's visit to its transfer: begun when the id is looked up, ended with the answer."""

import contextlib
import socket
from collections.abc import Callable
from typing import Any

import falcon

from imageserver.transfers import Transfer
from imageserver.visits import UNTRACKED, Visit, Visits


def begin_visit(visits: Visits, req: falcon.Request, transfer_id: str) -> Transfer:
    """Look an id up, on behalf of a request that ``end_visit`` will be called for."""
    disconnect = _disconnector(req.env.get("gunicorn.socket"))
    transfer, req.context.visit = visits.begin(transfer_id, disconnect)
    return transfer


def visit_of(req: falcon.Request) -> Visit:
    """Return a request's visit."""
    visit: Visit = getattr(req.context, "visit", UNTRACKED)
    return visit


def end_visit(req: falcon.Request) -> None:
    """End a request's visit, if it has one that goes on."""
    visit_of(req).close()


def _disconnector(sock: Any) -> Callable[[], None]:  # noqa: ANN401 - whatever the server has
    def disconnect() -> None:
        if isinstance(sock, socket.socket):
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)  # below TLS

    return disconnect
