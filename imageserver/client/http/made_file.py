# SPDX-License-Identifier: Apache-2.0
"""The qcow2 file that a server makes of an image (``format=qcow2``, docs/api.md).

It is what it was when it was first asked for, or ``Different`` is raised: its ETag tells.
"""

from imageserver.client.failures import Busy, Different, Refused
from imageserver.client.http.remote import Remote
from imageserver.client.http.transport import Response

#: How long the server may walk over extents before it sends the first byte, in seconds.
_WALK_SECONDS = 600.0
#: What a server answers to a range of a file that is another one, or shorter.
_OK, _OUTSIDE = 200, 416


class MadeFile(Remote):
    """``size`` and ``read`` are the file's, in place of the image's."""

    def __init__(self, image: Remote) -> None:
        """Ask for the file, over the image's connections.

        Raises:
            Busy: without an ETag two states could be mixed; there may be one in a moment.
        """
        vars(self).update(vars(image))
        self._target = self._at("", "format=qcow2")
        self.etag = ""
        self.etag = self._head().headers.get("ETag", "")
        if not self.etag:
            # A raw file that has been changed a moment ago has none yet.
            raise Busy(f"{self._transport.name} cannot tell yet which state the image has", 1.0)

    def _head(self) -> Response:
        response = self._transport.request("HEAD", self._target, silent_seconds=_WALK_SECONDS)
        response.drain_conn()
        if self.etag and response.headers.get("ETag") != self.etag:
            raise _changed()
        return response

    def _ask_for(self, start: int, stop: int) -> Response:
        headers = {"Range": f"bytes={start}-{stop - 1}", "If-Range": self.etag}
        try:
            return self._transport.request(
                "GET",
                self._target,
                expected=(206,),
                headers=headers,
                silent_seconds=_WALK_SECONDS,
            )
        except Refused as exc:
            if exc.code in {_OK, _OUTSIDE}:
                raise _changed() from exc
            raise


def _changed() -> Different:
    return Different("where the image has data has changed")
