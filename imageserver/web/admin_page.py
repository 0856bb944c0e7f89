# SPDX-License-Identifier: Apache-2.0
"""The operators' page: ``GET /`` of the admin listener, one file that needs no other.

The browser is told to run nothing but the script and style that stand in that file, by their
hashes, and to ask nobody but this listener (Content-Security-Policy). What the page shows it asks
``/status`` and ``/map`` for, and puts in as text, never as markup.
"""

import base64
import hashlib
import re
from importlib import resources

import falcon


class Page:
    """The page, read from the package once."""

    def __init__(self) -> None:
        self._text = resources.files(__package__).joinpath("page.html").read_bytes()
        self._policy = policy(self._text)

    def on_get(self, _req: falcon.Request, resp: falcon.Response) -> None:
        """Send it."""
        resp.content_type = "text/html; charset=utf-8"
        resp.set_header("Content-Security-Policy", self._policy)
        resp.data = self._text

    on_head = on_get


def policy(text: bytes) -> str:
    """Return what a browser may do with the page (CSP level 3, section 2.3.1)."""
    rules = {
        "default-src": "'none'",
        "script-src": _hash(text, b"script"),
        "style-src": _hash(text, b"style"),
        "connect-src": "'self'",
        "img-src": "data:",  # the icon, which is none
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def _hash(text: bytes, element: bytes) -> str:
    (content,) = re.findall(rb"<%b>(.*?)</%b>" % (element, element), text, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content).digest()).decode()}'"
