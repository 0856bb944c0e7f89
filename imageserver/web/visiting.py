# SPDX-License-Identifier: Apache-2.0
"""A request's visit to its transfer: begun when the id is looked up, ended with the answer."""

import contextlib
import socket
from collections.abc import Callable
from typing import Any

import falcon

from imageserver.core.transfer import Transfer
from imageserver.images.sessions import Need, Session, Sessions
from imageserver.transfers.visits import UNTRACKED, Visit, Visits
from imageserver.web.journaling import trace_of

#: Under this key of the environ the server tells whether the client has gone; from any thread.
IS_GONE = "imageserver.is_gone"


def begin_visit(visits: Visits, req: falcon.Request, transfer_id: str) -> Transfer:
    """Look an id up, on behalf of a request that ``end_visit`` will be called for."""
    trace_of(req).asks_for(transfer_id)
    disconnect = _disconnector(req.env.get("gunicorn.socket"))
    probes = req.method == "OPTIONS"
    transfer, req.context.visit = visits.begin(transfer_id, disconnect, probes=probes)
    trace_of(req).found(transfer)
    return transfer


def open_session(
    sessions: Sessions, req: falcon.Request, transfer: Transfer, need: Need
) -> Session:
    """Open the session that a request needs: see ``Sessions.open``."""
    trace_of(req).needs(need)
    is_gone = req.env.get(IS_GONE, lambda: False)
    session = sessions.open(transfer, need, req.remote_addr, _visit_of(req), is_gone)
    trace_of(req).has(session)
    return session


def end_visit(req: falcon.Request) -> None:
    """End a request's visit, if it has one that goes on."""
    _visit_of(req).close()


def _visit_of(req: falcon.Request) -> Visit:
    visit: Visit = getattr(req.context, "visit", UNTRACKED)
    return visit


def _disconnector(sock: Any) -> Callable[[], None]:  # noqa: ANN401 - whatever the server has
    def disconnect() -> None:
        if isinstance(sock, socket.socket):
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)  # below TLS

    return disconnect
