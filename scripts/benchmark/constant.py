# SPDX-License-Identifier: Apache-2.0
"""A Falcon application that answers OPTIONS with a constant: the cost of gunicorn and Falcon."""

import falcon

_ANSWER = {
    "unix_socket": None,
    "features": ["extents", "zero", "flush", "digest"],
    "max_readers": 8,
    "max_writers": 1,
}


class Constant:
    """Answers without looking at anything."""

    def on_options(self, _req: falcon.Request, resp: falcon.Response, image_id: str) -> None:
        """Answer as long as the image server does."""
        resp.set_header("Allow", "GET, HEAD, PUT, PATCH, OPTIONS")
        resp.media = _ANSWER


app = falcon.App()
app.add_route("/images/{image_id}", Constant())
