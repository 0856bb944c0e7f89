# SPDX-License-Identifier: Apache-2.0
"""How JSON answers are written: compact, with their length known."""

import json

import falcon


def to_json(value: object) -> bytes:
    """Encode compactly."""
    return json.dumps(value, separators=(",", ":")).encode()


def set_json(resp: falcon.Response, value: object) -> None:
    """Make ``value`` the whole body of an answer."""
    resp.content_type = falcon.MEDIA_JSON
    resp.data = to_json(value)
