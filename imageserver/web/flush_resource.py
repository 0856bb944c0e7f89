# SPDX-License-Identifier: Apache-2.0
"""``/images/{id}/flush``: data on stable storage before the answer."""

import falcon

from imageserver.core.transfer import Transfer
from imageserver.images import operations, sessions
from imageserver.images.sessions import Sessions
from imageserver.web.answers import OK, set_encoded
from imageserver.web.headers import check_method
from imageserver.web.requests import open_session


class FlushResource:
    """The image's way to stable storage."""

    def __init__(self, opened: Sessions) -> None:
        self._sessions = opened

    def check_method(self, method: str, _transfer: Transfer) -> None:
        """Refuse all but POST."""
        check_method(method, ("POST",))

    def on_post(self, req: falcon.Request, resp: falcon.Response, transfer: Transfer) -> None:
        """Flush; the body, if any, is not looked at."""
        with open_session(self._sessions, req, transfer, sessions.FLUSH) as session:
            operations.flush(session)
        set_encoded(resp, OK)
