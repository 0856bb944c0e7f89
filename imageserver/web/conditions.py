# SPDX-License-Identifier: Apache-2.0
"""Conditional requests: their fields read, and what answers say of an image's state.

The rules are ``core/validators``'s. What has no validators must not be stored by any cache, which
the middleware says of every answer; what has them may be, and is asked about before it is used.
"""

import falcon

from imageserver.core.validators import (
    UNCONDITIONAL,
    Conditions,
    Tags,
    Validators,
    parse_date,
    parse_tags,
)


def read_conditions(req: falcon.Request) -> Conditions:
    """Return what a request depends on.

    Raises:
        BadRequest: ``If-Match`` or ``If-None-Match`` is malformed.
    """
    env = req.env
    if not (  # most requests, at once
        "HTTP_IF_MATCH" in env
        or "HTTP_IF_NONE_MATCH" in env
        or "HTTP_IF_RANGE" in env
        or "HTTP_IF_MODIFIED_SINCE" in env
        or "HTTP_IF_UNMODIFIED_SINCE" in env
    ):
        return UNCONDITIONAL
    has_range = "HTTP_RANGE" in env
    return Conditions(
        match=_tags(req, "If-Match"),
        none_match=_tags(req, "If-None-Match"),
        modified_since=_date(req, "If-Modified-Since"),
        unmodified_since=_date(req, "If-Unmodified-Since"),
        if_range=(req.get_header("If-Range") or "").strip(" \t") if has_range else None,
    )


def _tags(req: falcon.Request, name: str) -> Tags | None:
    value = req.get_header(name)
    return None if value is None else parse_tags(name, value)


def _date(req: falcon.Request, name: str) -> int | None:
    value = req.get_header(name)
    return None if value is None else parse_date(value)


def say_state(resp: falcon.Response, state: Validators | None) -> None:
    """Send the image's validators, where it has them, with an answer that succeeds."""
    if state is None or state.etag is None:
        return
    resp.set_header("ETag", state.etag)
    if modified := state.last_modified:
        resp.set_header("Last-Modified", modified)
    resp.set_header("Cache-Control", "no-cache")


def answer_not_modified(resp: falcon.Response, state: Validators | None) -> None:
    """Answer that the client has the image already (RFC 9110 section 15.4.5)."""
    resp.status = falcon.HTTP_NOT_MODIFIED
    if state and state.etag is not None:
        resp.set_header("ETag", state.etag)
        resp.set_header("Cache-Control", "no-cache")
