# SPDX-License-Identifier: Apache-2.0
"""The application of the admin listener: ``/healthz``, ``/readyz``, ``/status``, ``/metrics``.

Read-only, and apart from that of the images: it takes no lock and no slot, and a transfer that
is stuck does not stop it. An id is a right, so it is told in full only to those who may look
into the server's own files anyway; the others get a hash that names it.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import falcon

from imageserver.core.entry import Exposition
from imageserver.core.errors import ImageServerError, MethodNotAllowed
from imageserver.core.reports import Living
from imageserver.core.slots import Holder, Kind
from imageserver.core.transfer import id_hash
from imageserver.core.workers import WorkerState
from imageserver.web.answers import set_json
from imageserver.web.app import App
from imageserver.web.error_answers import answer_for

log = logging.getLogger(__name__)

_METHODS = ("GET", "HEAD")
#: Digits of an id's hash: a thousand transfers collide once in half a million times.
_HASH_DIGITS = 12
_RUNNING = (Kind.READ, Kind.WRITE, Kind.OTHER)


@dataclass(frozen=True, slots=True)
class AdminSources:
    """Where the answers of the admin listener come from."""

    table: Living
    limits: Mapping[str, int | None]
    """On how much may run at once, by the settings' names; None: there is none."""
    checks: Mapping[str, Callable[[], str]]
    """By name, each a problem or ""."""
    metrics: Callable[[], Exposition]


def create_admin_app(sources: AdminSources, *, full_ids: bool) -> App:
    """Put the application together."""
    app = falcon.App(middleware=_ReadOnly())
    app.add_route("/healthz", _Health())
    app.add_route("/readyz", _Readiness(sources.checks))
    app.add_route("/status", _Status(sources.table, sources.limits, full_ids=full_ids))
    app.add_route("/metrics", _Metrics(sources.metrics))
    app.add_error_handler(Exception, _refuse_unexpected)
    app.add_error_handler(falcon.HTTPError, _refuse_http)
    app.add_error_handler(ImageServerError, _refuse)
    return app


class _ReadOnly:
    """Refuses every other method, also those that Falcon would answer itself."""

    def process_resource(
        self, req: falcon.Request, _resp: falcon.Response, _resource: object, _params: object
    ) -> None:
        if req.method not in _METHODS:
            raise MethodNotAllowed(_METHODS)

    def process_response(
        self,
        _req: falcon.Request,
        resp: falcon.Response,
        _resource: object,
        _req_succeeded: bool,  # noqa: FBT001 - Falcon's signature
    ) -> None:
        resp.set_header("Cache-Control", "no-store")


class _Resource:
    """A resource whose GET answers HEAD, too."""

    def on_get(self, _req: falcon.Request, _resp: falcon.Response) -> None:
        raise NotImplementedError

    def on_head(self, req: falcon.Request, resp: falcon.Response) -> None:
        self.on_get(req, resp)


class _Health(_Resource):
    """That this is answered is the answer."""

    def on_get(self, _req: falcon.Request, resp: falcon.Response) -> None:
        set_json(resp, {"status": "ok"})


class _Readiness(_Resource):
    """Whether transfers could be served now."""

    def __init__(self, checks: Mapping[str, Callable[[], str]]) -> None:
        self._checks = checks

    def on_get(self, _req: falcon.Request, resp: falcon.Response) -> None:
        found = [(name, check()) for name, check in self._checks.items()]
        failed = [{"check": name, "problem": problem} for name, problem in found if problem]
        if failed:
            resp.status = 503
        set_json(resp, {"status": "not ready" if failed else "ready", "failed": failed})


class _Status(_Resource):
    """Every transfer that runs, of every worker, the oldest first; and the limits on them."""

    def __init__(self, table: Living, limits: Mapping[str, int | None], *, full_ids: bool) -> None:
        self._table = table
        self._limits = dict(limits)
        self._full_ids = full_ids

    def on_get(self, _req: falcon.Request, resp: falcon.Response) -> None:
        now_ns = time.monotonic_ns()
        running = [row for row in self._table.living(*_RUNNING) if row.transfer]
        running.sort(key=lambda row: row.started_ns)
        workers = sorted(self._table.living(Kind.WORKER), key=lambda row: row.owner.pid)
        transfers = [self._transfer(row, now_ns) for row in running]
        told = {"transfers": transfers, "workers": [_worker(row) for row in workers]}
        set_json(resp, told | {"limits": self._limits})

    def _transfer(self, row: Holder, now_ns: int) -> dict[str, object]:
        age = row.age(now_ns)
        name = row.transfer if self._full_ids else id_hash(row.transfer)[:_HASH_DIGITS]
        return {
            "id": name,
            "operation": row.operation,
            "client": row.client,
            "worker": row.owner.pid,
            "done": row.done,
            "expected": row.expected,
            "rate": round(row.done / age) if age else 0,
            "age": round(age, 3),
        }


def _worker(row: Holder) -> dict[str, object]:
    return {
        "worker": row.owner.pid,
        "state": WorkerState.of(row).name.lower(),
        "busy": row.done,
    }


class _Metrics(_Resource):
    """What Prometheus reads."""

    def __init__(self, metrics: Callable[[], Exposition]) -> None:
        self._metrics = metrics

    def on_get(self, _req: falcon.Request, resp: falcon.Response) -> None:
        exposition = self._metrics()
        resp.content_type = exposition.content_type
        resp.data = exposition.text


def _refuse(
    _req: falcon.Request, resp: falcon.Response, error: ImageServerError, _params: object
) -> None:
    answer = answer_for(error)
    resp.status = answer.status
    resp.set_headers(answer.headers)
    set_json(resp, {"error": answer.message})


def _refuse_http(
    _req: falcon.Request, resp: falcon.Response, error: falcon.HTTPError, _params: object
) -> None:
    resp.status = error.status
    is_unknown = isinstance(error, falcon.HTTPNotFound)
    set_json(resp, {"error": "not found" if is_unknown else "bad request"})


def _refuse_unexpected(
    req: falcon.Request, resp: falcon.Response, error: Exception, _params: object
) -> None:
    log.error("%s %s failed", req.method, req.path, exc_info=error)
    resp.status = 500
    set_json(resp, {"error": "internal error"})
