# SPDX-License-Identifier: Apache-2.0
"""The application of the admin listener: the page, health, status, an image's map, metrics.

Read-only, and apart from that of the images: it takes no lock and no slot, and a transfer that
is stuck does not stop it. Who may ask in a browser: ``admin_guard``.
"""

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import falcon

from imageserver.core.entry import Exposition
from imageserver.core.errors import (
    ImageServerError,
    MethodNotAllowed,
    NotFound,
    UnknownImage,
)
from imageserver.core.transfer import Transfer
from imageserver.images.mapping import Mapper, NoMap
from imageserver.web.admin_guard import AdminGuard
from imageserver.web.admin_page import Page
from imageserver.web.admin_status import Books, drawn, find, known_ids, status
from imageserver.web.answers import set_json
from imageserver.web.app import App
from imageserver.web.error_answers import answer_for

log = logging.getLogger(__name__)

_METHODS = ("GET", "HEAD")


@dataclass(frozen=True, slots=True)
class AdminSources:
    """Where the answers of the admin listener come from."""

    books: Books
    find: Callable[[str], Transfer]
    """Looks an id up, which uses nothing; raises ``UnknownImage``."""
    mapper: Mapper
    checks: Mapping[str, Callable[[], str]]
    """By name, each a problem or ""."""
    metrics: Callable[[], Exposition]


def create_admin_app(
    sources: AdminSources, hosts: Collection[str] | None, *, full_ids: bool
) -> App:
    """Put the application together.

    ``hosts``: the names under which it may be asked, None: any. ``full_ids``: who asks may look
    into the server's own files anyway; others are told no id, which is a right, but its hash.
    """
    app = falcon.App(middleware=AdminGuard(hosts))
    app.add_middleware(_ReadOnly())
    app.add_route("/", Page())
    app.add_route("/healthz", _Health())
    readiness = _Readiness(sources.checks)
    app.add_route("/readyz", readiness)
    app.add_route("/status", _Status(sources.books, readiness, full_ids=full_ids))
    app.add_route("/map", _Map(sources))
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
        told = self.told()
        if told["failed"]:
            resp.status = 503
        set_json(resp, told)

    def told(self) -> dict[str, object]:
        """Run the checks; return the answer."""
        found = [(name, check()) for name, check in self._checks.items()]
        failed = [{"check": name, "problem": problem} for name, problem in found if problem]
        return {"status": "not ready" if failed else "ready", "failed": failed}


class _Status(_Resource):
    """What runs, what has ended, and the limits on it."""

    def __init__(self, books: Books, readiness: _Readiness, *, full_ids: bool) -> None:
        self._books, self._readiness, self._full_ids = books, readiness, full_ids

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        told = status(self._books, full_ids=self._full_ids, opened=req.get_param("transfer"))
        if req.get_param("readiness") == "y":
            told["readiness"] = self._readiness.told()
        set_json(resp, told)


class _Map(_Resource):
    """The map of one transfer's image, or why there is none now."""

    def __init__(self, sources: AdminSources) -> None:
        self._sources = sources

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        sources = self._sources
        found = find(req.get_param("transfer", default=""), known_ids(sources.books))
        if found is None:
            raise NotFound(req.path)
        try:
            picture = sources.mapper.picture(sources.find(found))
        except UnknownImage:
            set_json(resp, {"map": None, "problem": "the transfer is not there any more"})
        except NoMap as exc:
            set_json(resp, {"map": None, "problem": str(exc)})
        else:
            set_json(resp, {"map": drawn(picture), "problem": ""})


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
