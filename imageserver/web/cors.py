# SPDX-License-Identifier: Apache-2.0
"""What lets scripts of other web sites ask: the CORS protocol (Fetch standard, section 3.2).

A browser asks before a PUT, or any request with ``Authorization`` or ``Range``: the *preflight*,
OPTIONS with ``Access-Control-Request-Method``. It never carries a token. Nothing is sent for an
origin that the settings do not name, and nothing at all where they name none.
"""

from collections.abc import Collection

import falcon

#: ``*`` stands for all but this one.
_HEADERS = "*, Authorization"
#: How long a browser may remember a preflight, in seconds: as oVirt's daemon has it.
_MAX_AGE = "86400"
#: Of all images, for a preflight that may not learn which one has which.
_METHODS = "GET, PUT, PATCH, POST, OPTIONS"


class Cors:
    """Which origins may ask; ``*`` among them: all."""

    def __init__(self, origins: Collection[str]) -> None:
        self._origins = frozenset(origins)

    def __bool__(self) -> bool:
        """Tell whether any may."""
        return bool(self._origins)

    def _allowed(self, req: falcon.Request) -> str:
        """Return the origin to allow; empty: none."""
        origin: str | None = req.env.get("HTTP_ORIGIN")
        if origin is None:
            return ""
        if "*" in self._origins:
            return "*"
        return origin if origin in self._origins else ""

    def is_preflight(self, req: falcon.Request) -> bool:
        """Tell whether this is a preflight of an origin that may ask."""
        asks = req.method == "OPTIONS" and "HTTP_ACCESS_CONTROL_REQUEST_METHOD" in req.env
        return asks and bool(self._allowed(req))

    def answer_preflight(self, resp: falcon.Response) -> None:
        """Say that a request may be made, and nothing of the image."""
        resp.status = falcon.HTTP_NO_CONTENT
        resp.set_header("Access-Control-Allow-Methods", _METHODS)
        resp.complete = True

    def add_headers(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Let a script read this answer, or make its request, where its origin may."""
        resp.append_header("Vary", "Origin")
        origin = self._allowed(req)
        if not origin:
            return
        resp.set_header("Access-Control-Allow-Origin", origin)
        if self.is_preflight(req):
            resp.set_header("Access-Control-Allow-Headers", _HEADERS)
            resp.set_header("Access-Control-Max-Age", _MAX_AGE)
        else:
            resp.set_header("Access-Control-Expose-Headers", "*")
