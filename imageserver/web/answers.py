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


def written(length: int, *, flushed: bool | None = None) -> bytes:
    """Say how much was written, and whether it was flushed where that was asked for."""
    more = "" if flushed is None else f',"flushed":{"true" if flushed else "false"}'
    return f'{{"ok":true,"bytes_written":{length}{more}}}'.encode()


#: What is said where there is nothing else to say.
OK = to_json({"ok": True})
