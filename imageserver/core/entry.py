# SPDX-License-Identifier: Apache-2.0
"""The log entry of a finished request, which metrics count as well; fields of log lines."""

from collections.abc import Mapping
from typing import NamedTuple

from imageserver.core.ranges import Span

#: Key of ``extra`` (logging) under which a record carries its fields.
FIELDS = "imageserver_fields"


def fields(**values: object) -> dict[str, Mapping[str, object]]:
    """Return the ``extra`` of a log call that gives a line these fields, quoted where they need it.

    For whatever a client or control program has chosen, such as an id.
    """
    return {FIELDS: values}


class Entry(NamedTuple):
    """One finished request. Text fields are empty where nothing is known."""

    method: str
    transfer: str
    """The id; not for metrics."""
    operation: str
    """What a session was asked for (``sessions.Need``), else the method in lower case."""
    backend: str
    """``nbd`` or ``file``."""
    span: Span | None
    """The range of the image, once it was known."""
    done: int
    """Bytes of the image read, written, zeroed or described."""
    status: int
    """HTTP status; 0 where the client had gone before there was one."""
    error: str
    """The class of what went wrong: ``ImageBusy``, ``NoSlot``, ``ClientGone``, ..."""
    detail: str
    """... and its text, which is for the log only."""
    seconds: float
    client: str
    request: str
    """The request's id (``X-Request-Id``)."""


class Exposition(NamedTuple):
    """All metrics as Prometheus reads them."""

    text: bytes
    content_type: str
