# SPDX-License-Identifier: Apache-2.0
"""The log: one line an event on standard error, as text or as JSON.

    [2026-01-31 12:00:00 +0000] [4711] [INFO] finished transfer=vda op=read bytes=512 ...
    {"time":"2026-01-31T12:00:00.000+00:00","level":"info","worker":4711,"message":"finished",...}

Under systemd lines have no time, which journald adds, but begin with their priority
(sd-daemon(3)), every line of a traceback too: ``journalctl -p warning`` finds them.
"""

import io
import json
import logging
import os
import re
import sys
import time
from collections.abc import Mapping

from imageserver.core.entry import FIELDS, Entry, fields

#: What logfmt readers take without quotes.
_PLAIN = re.compile(r"[!#-<>-~]+")
#: RFC 5424 section 6.2.1, by the level that a priority begins at.
_PRIORITIES = ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
#: Load balancers ask for these many times a second; the metrics count failures.
_PROBES = frozenset(("options", "head"))
#: Statuses that are the server's or the host's fault: the operator is warned.
_SERIOUS = frozenset((500, 504, 507))
_SERIOUS_ERRORS = frozenset(("BackendError", "BackendTimeout", "StateUnavailable"))


def configure(level: str, style: str = "text") -> None:
    """Log to standard error; calling it again changes level and style."""
    logger = logging.getLogger("imageserver")
    logger.setLevel(level.upper())
    logger.propagate = False
    if not logger.handlers:
        if isinstance(sys.stderr, io.TextIOWrapper):  # readers do not know the locale
            sys.stderr.reconfigure(encoding="utf-8", errors="backslashreplace")
        logger.addHandler(logging.StreamHandler(sys.stderr))
    logger.handlers[0].setFormatter(formatter(style))


def formatter(style: str) -> logging.Formatter:
    """Return the formatter of ``text`` or ``json``."""
    # systemd sets JOURNAL_STREAM for services whose output it collects (systemd.exec(5)).
    in_journal = "JOURNAL_STREAM" in os.environ
    return _Json(in_journal=in_journal) if style == "json" else _Text(in_journal=in_journal)


class _Text(logging.Formatter):
    """``message key=value ...``, with values quoted where they need it."""

    def __init__(self, *, in_journal: bool) -> None:
        stamp = "" if in_journal else "[%(asctime)s] "
        form = stamp + "[%(process)d] [%(levelname)s] %(message)s"
        super().__init__(form, "%Y-%m-%d %H:%M:%S %z")
        self._in_journal = in_journal

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """Append the fields to the message, whose parts may have come from a client."""
        if record.name.startswith("imageserver"):  # gunicorn's may have several lines on purpose
            record.message = _printable(record.message)
        pairs = [f" {key}={_plain(value)}" for key, value in _fields_of(record).items()]
        return super().formatMessage(record) + "".join(pairs)

    def format(self, record: logging.LogRecord) -> str:
        """Write a record."""
        text = super().format(record)
        return _with_priority(record, text) if self._in_journal else text


class _Json(logging.Formatter):
    """One JSON object a record."""

    def __init__(self, *, in_journal: bool) -> None:
        super().__init__()
        self._in_journal = in_journal

    def format(self, record: logging.LogRecord) -> str:
        """Write a record."""
        line: dict[str, object] = {} if self._in_journal else {"time": _time(record.created)}
        line["level"] = record.levelname.lower()
        line["worker"] = record.process
        line["message"] = record.getMessage()
        line |= _fields_of(record)
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        text = json.dumps(line, separators=(",", ":"), default=str)
        return _with_priority(record, text) if self._in_journal else text


def _fields_of(record: logging.LogRecord) -> Mapping[str, object]:
    found: Mapping[str, object] = getattr(record, FIELDS, {})
    return found


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _time(seconds: float) -> str:
    whole, milliseconds = divmod(int(seconds * 1000), 1000)
    moment = time.localtime(whole)
    zone = time.strftime("%z", moment)
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", moment)
    return f"{stamp}.{milliseconds:03}{zone[:3]}:{zone[3:]}"


def _plain(value: object) -> str:
    text = "-" if value is None or value == "" else str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


def _with_priority(record: logging.LogRecord, text: str) -> str:
    found = (priority for level, priority in _PRIORITIES if record.levelno >= level)
    mark = f"<{next(found, 7)}>"
    return "\n".join(mark + line for line in text.split("\n"))


log = logging.getLogger(__name__)


class OperationLog:
    """``ports.Journal``: a line for each finished operation."""

    def finished(self, entry: Entry) -> None:
        """Log an entry: probes at level debug, failures of server and host as warnings."""
        level = logging.DEBUG if entry.operation in _PROBES else logging.INFO
        if entry.status in _SERIOUS or entry.error in _SERIOUS_ERRORS:
            level = logging.WARNING
        if log.isEnabledFor(level):
            log.log(level, "finished", extra=fields(**_told(entry)))


def _told(entry: Entry) -> dict[str, object]:
    span = entry.span
    told: dict[str, object] = {
        "transfer": entry.transfer,
        "op": entry.operation,
        "range": f"{span.start}-{span.stop - 1}" if span and span.length else None,
        "bytes": entry.done,
        "status": entry.status,
        "seconds": round(entry.seconds, 6),
        "rate": round(entry.done / entry.seconds) if entry.seconds else 0,
        "worker": os.getpid(),
        "client": entry.client,
        "request": entry.request,
    }
    if entry.error:
        told |= {"error": entry.error, "detail": entry.detail}
    return told
