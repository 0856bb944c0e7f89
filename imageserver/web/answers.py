# SPDX-License-Identifier: Apache-2.0
"""How JSON answers are written: compact, with their length known."""

import json

import falcon

_ENCODER = json.JSONEncoder(separators=(",", ":"))


def to_json(value: object) -> bytes:
    """Encode compactly."""
    return _ENCODER.encode(value).encode()


def set_json(resp: falcon.Response, value: object) -> None:
    """Make ``value`` the whole body of an answer."""
    set_encoded(resp, to_json(value))


def set_encoded(resp: falcon.Response, body: bytes) -> None:
    """Make JSON the whole body of an answer."""
    resp.content_type = falcon.MEDIA_JSON
    resp.data = body


#: What is said where there is nothing else to say.
OK = to_json({"ok": True})
