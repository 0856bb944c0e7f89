# SPDX-License-Identifier: Apache-2.0
"""``/images/{id}/checksum`` and ``/images/{id}/checksum/algorithms`` (docs/api.md).

The answer is a JSON object. While it is computed blanks are sent before it, so that a client that
has gone is noticed, and one that waits is not given up by what is between.
"""

import time
from collections.abc import Callable, Generator

import falcon

from imageserver.core.checksums import ALGORITHMS, DEFAULT_ALGORITHM, Recipe
from imageserver.core.errors import BadRequest
from imageserver.core.ranges import whole
from imageserver.core.transfer import Transfer
from imageserver.images import sessions
from imageserver.images.checksumming import checksum
from imageserver.images.sessions import Sessions
from imageserver.web.answers import set_encoded, to_json
from imageserver.web.body import StreamedBody
from imageserver.web.headers import check_method, read_parameter, read_span
from imageserver.web.requests import open_session

#: How long nothing is written at most, in seconds.
_QUIET_SECONDS = 1.0


class ChecksumResource:
    """A digest of an image's bytes."""

    def __init__(self, opened: Sessions) -> None:
        self._sessions = opened

    def check_method(self, method: str, _transfer: Transfer) -> None:
        """Refuse all but GET."""
        check_method(method, ("GET",))

    def on_get(self, req: falcon.Request, resp: falcon.Response, transfer: Transfer) -> None:
        """Compute a checksum of the image, or of a span of it."""
        names = req.get_param_as_list("algorithm") or [DEFAULT_ALGORITHM]
        if len(names) > 1:
            raise BadRequest('invalid "algorithm": there must be one')
        recipe = Recipe(names[0], read_parameter(req, "block_size"))
        wanted = read_span(req)
        session = open_session(self._sessions, req, transfer, sessions.CHECKSUM)
        try:
            span = wanted.resolve(session.size) if wanted else whole(session.size)
            body = StreamedBody(req, session, encode(checksum(session, span, recipe), recipe))
        except BaseException:
            session.close()
            raise
        resp.content_type = falcon.MEDIA_JSON
        resp.stream = body


def encode(
    steps: Generator[bool], recipe: Recipe, *, clock: Callable[[], float] = time.monotonic
) -> Generator[bytes]:
    """Yield blanks while there is nothing to tell, then the answer."""
    told = clock()
    for is_there in steps:
        if is_there:
            yield to_json(recipe.answer())
        elif clock() - told >= _QUIET_SECONDS:
            yield b" "
            told = clock()


class AlgorithmsResource:
    """Which checksums there are."""

    def check_method(self, method: str, _transfer: Transfer) -> None:
        """Refuse all but GET."""
        check_method(method, ("GET",))

    def on_get(self, _req: falcon.Request, resp: falcon.Response, transfer: Transfer) -> None:
        """List them."""
        set_encoded(resp, _ALGORITHMS)


_ALGORITHMS = to_json({"algorithms": sorted(ALGORITHMS)})
