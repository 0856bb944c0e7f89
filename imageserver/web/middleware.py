# SPDX-License-Identifier: Apache-2.0
"""What every request goes through: id, token, method before any responder, headers after.

The order of checks is part of the API (docs/api.md): route, id, token, method; responders do the
rest.
"""

from typing import Any, Protocol

import falcon

from imageserver.core.errors import NotFound, Unauthorized, UnknownImage
from imageserver.core.transfer import Transfer
from imageserver.transfers.tracking import Tracker
from imageserver.web.body import StreamedBody
from imageserver.web.cors import Cors
from imageserver.web.requests import request_of

#: Sent with every answer. Responders change what an image of its own says better: its methods,
#: and whether what has validators may be stored (``conditions``).
_COMMON = (
    ("Cache-Control", "no-store"),
    ("Accept-Ranges", "bytes"),
    ("Access-Control-Allow-Methods", "GET, PUT, OPTIONS"),
)
#: No body goes with these (RFC 9110 section 6.4.1).
_BODILESS = (204, 304)
_ENCODED_SEPARATORS = ("%2f", "%5c", "%00")


class Resource(Protocol):
    """What routes lead to."""

    def check_method(self, method: str, transfer: Transfer) -> None:
        """Raise where the resource lacks the method for this transfer."""
        ...


class ImageMiddleware:
    """Turns ids into transfers, and gives every answer the headers clients rely on."""

    def __init__(self, tracker: Tracker, cors: Cors) -> None:
        self._tracker = tracker
        self._cors = cors

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Refuse encoded separators: decoded, they would look like routes."""
        resp.set_headers(_COMMON)
        path: str = req.env.get("RAW_URI", "")
        if "%" in path:
            path = path.partition("?")[0].lower()
            if any(code in path for code in _ENCODED_SEPARATORS):
                raise UnknownImage(path)

    def process_resource(
        self,
        req: falcon.Request,
        resp: falcon.Response,
        resource: Resource,
        params: dict[str, Any],
    ) -> None:
        """Look the id up, see whether its token is shown, and whether the image has the method."""
        if "image_id" not in params:
            if req.path == "/*":  # the request target "*" has no slash
                raise NotFound(req.path)
            if req.method != "OPTIONS":
                raise UnknownImage("*")
            return
        probes = req.method == "OPTIONS"
        is_preflight = probes and self._cors.is_preflight(req)
        is_answered = not probes or hasattr(resource, "on_options")
        if not (is_answered or is_preflight):
            raise NotFound(req.path)
        transfer = self._tracker.enter(request_of(req), params.pop("image_id"), probes=probes)
        is_refused = bool(
            transfer.token and not transfer.token.is_shown(req.env.get("HTTP_AUTHORIZATION"))
        )
        if is_preflight and (is_refused or not is_answered):
            self._cors.answer_preflight(resp)
            return
        if is_refused:
            raise Unauthorized
        resource.check_method(req.method, transfer)
        params["transfer"] = transfer

    def process_response(
        self,
        req: falcon.Request,
        resp: falcon.Response,
        _resource: object,
        req_succeeded: bool,  # noqa: FBT001 - Falcon's signature
    ) -> None:
        """Say what scripts may read; close a stream that Falcon would drop unclosed."""
        if self._cors:
            self._cors.add_headers(req, resp)
        stream = resp.stream
        is_dropped = not req_succeeded or req.method == "HEAD" or resp.status_code in _BODILESS
        if isinstance(stream, StreamedBody) and is_dropped:
            resp.stream = None
            stream.close()
        if not isinstance(resp.stream, StreamedBody):  # which leaves before its last piece
            request_of(req).leave()
