# SPDX-License-Identifier: Apache-2.0
"""The application: routes, and who handles which error, in reading order."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import falcon

from imageserver.errors import ClientGone, ImageServerError
from imageserver.inspection import Inspector, WouldWait
from imageserver.ports import Journal
from imageserver.sessions import Sessions
from imageserver.visits import Visits
from imageserver.web import errors
from imageserver.web.extents import ExtentsResource
from imageserver.web.flush import FlushResource
from imageserver.web.images import ImageResource, Limits, ServerResource
from imageserver.web.journaling import JournalMiddleware
from imageserver.web.middleware import ImageMiddleware

App: TypeAlias = "falcon.App[Any, Any]"


def create_app(
    visits: Visits,
    sessions: Sessions,
    inspector: Inspector,
    limits: Limits,
    journals: Sequence[Journal] = (),
) -> App:
    """Put the application together."""
    app = falcon.App(middleware=JournalMiddleware(journals))
    app.add_middleware(ImageMiddleware(visits))
    app.req_options.strip_url_path_trailing_slash = True

    server = ServerResource(limits)
    app.add_route("/*", server)  # the request target "*"
    app.add_route("/images/*", server)
    app.add_route("/images/{image_id}", ImageResource(sessions, inspector, limits))
    app.add_route("/images/{image_id}/extents", ExtentsResource(sessions))
    app.add_route("/images/{image_id}/flush", FlushResource(sessions))

    # The last one added that fits is asked first.
    app.add_error_handler(Exception, errors.handle_unexpected)
    app.add_error_handler(falcon.HTTPError, errors.handle_http)
    app.add_error_handler(ImageServerError, errors.handle)
    app.add_error_handler(ClientGone, errors.cut_off)
    app.add_error_handler(WouldWait, errors.put_off)
    return app
