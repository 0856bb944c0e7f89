# SPDX-License-Identifier: Apache-2.0
"""What is told of a request when it has ended: one entry, for the log and for the metrics."""

from dataclasses import dataclass

from imageserver.ranges import Span


@dataclass(frozen=True, slots=True)
class Entry:
    """One finished request. Text fields are empty where nothing is known."""

    method: str
    transfer: str
    """The id; not for metrics."""
    operation: str
    """What a session was asked for (``sessions.Need``), else the method in lower case."""
    backend: str
    """``nbd`` or ``file``."""
    span: Span | None
    """What of the image it was about, once that was known."""
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
