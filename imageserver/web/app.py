# SPDX-License-Identifier: Apache-2.0
"""The application: routes, and who handles which error, in reading order."""

from collections.abc import MutableSet, Sequence
from typing import Any, TypeAlias

import falcon

from imageserver.core.errors import ClientGone, ImageServerError
from imageserver.core.reports import Journal, Underway
from imageserver.images.probing import Inspector, WouldWait
from imageserver.images.sessions import Sessions
from imageserver.transfers.tracking import Tracker
from imageserver.web import error_answers
from imageserver.web.checksum_resource import AlgorithmsResource, ChecksumResource
from imageserver.web.cors import Cors
from imageserver.web.extents_resource import ExtentsResource
from imageserver.web.flush_resource import FlushResource
from imageserver.web.image_resource import ImageResource, Limits, ServerResource
from imageserver.web.middleware import ImageMiddleware
from imageserver.web.requests import RequestMiddleware

App: TypeAlias = "falcon.App[Any, Any]"


def create_app(  # noqa: PLR0913 - put together in one place
    tracker: Tracker,
    sessions: Sessions,
    inspector: Inspector,
    limits: Limits,
    journals: Sequence[Journal] = (),
    *,
    origins: Sequence[str] = (),
    put_flushes: bool = False,
    underway: MutableSet[Underway] | None = None,
) -> App:
    """Put the application together.

    ``origins``: see ``Cors``. ``put_flushes``: a PUT that does not say whether to flush does.
    ``underway``: what is to have the requests that use an image now.
    """
    app = falcon.App(middleware=RequestMiddleware(journals, underway))
    app.add_middleware(ImageMiddleware(tracker, Cors(origins)))
    app.req_options.strip_url_path_trailing_slash = True

    server = ServerResource(limits)
    app.add_route("/*", server)  # the request target "*"
    app.add_route("/images/*", server)
    image = ImageResource(sessions, inspector, limits, put_flushes=put_flushes)
    app.add_route("/images/{image_id}", image)
    app.add_route("/images/{image_id}/extents", ExtentsResource(sessions))
    app.add_route("/images/{image_id}/checksum", ChecksumResource(sessions))
    app.add_route("/images/{image_id}/checksum/algorithms", AlgorithmsResource())
    app.add_route("/images/{image_id}/flush", FlushResource(sessions))

    # The last one added that fits is asked first.
    app.add_error_handler(Exception, error_answers.handle_unexpected)
    app.add_error_handler(falcon.HTTPError, error_answers.handle_http)
    app.add_error_handler(ImageServerError, error_answers.handle)
    app.add_error_handler(ClientGone, error_answers.cut_off)
    app.add_error_handler(WouldWait, error_answers.put_off)
    return app
