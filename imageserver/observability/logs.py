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
from functools import cache, lru_cache
from typing import TextIO

from imageserver.core.entry import FIELDS, Entry

#: What logfmt readers take without quotes.
_PLAIN = re.compile(r"[!#-<>-~]+")
#: RFC 5424 section 6.2.1, by the level that a priority begins at.
_PRIORITIES = ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
#: Load balancers ask for these many times a second; the metrics count failures.
_PROBES = frozenset(("options", "head"))
#: Statuses that are the server's or the host's fault: the operator is warned.
_SERIOUS = frozenset((500, 504, 507))
_SERIOUS_ERRORS = frozenset(("BackendError", "BackendTimeout", "ImageChanged", "StateUnavailable"))


def configure(level: str, style: str = "text") -> None:
    """Log to standard error; calling it again changes level and style."""
    logger = logging.getLogger("imageserver")
    logger.setLevel(level.upper())
    logger.propagate = False
    if not logger.handlers:
        if isinstance(sys.stderr, io.TextIOWrapper):  # readers do not know the locale
            sys.stderr.reconfigure(encoding="utf-8", errors="backslashreplace")
        logger.addHandler(_Handler(sys.stderr))
    logger.handlers[0].setFormatter(formatter(style))


class _Handler(logging.StreamHandler[TextIO]):
    """Writes each record at once."""

    def flush(self) -> None:
        """Flush the stream, which ``emit`` asks for with the lock held already."""
        self.stream.flush()


def formatter(style: str) -> logging.Formatter:
    """Return the formatter of ``text`` or ``json``."""
    # systemd sets JOURNAL_STREAM for services whose output it collects (systemd.exec(5)).
    in_journal = "JOURNAL_STREAM" in os.environ
    return _Json(in_journal=in_journal) if style == "json" else _Text(in_journal=in_journal)


class _Text(logging.Formatter):
    """``message key=value ...``, with values quoted where they need it."""

    def __init__(self, *, in_journal: bool) -> None:
        super().__init__("%(message)s")
        self._in_journal = in_journal

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """Append the fields to the message, whose parts may have come from a client."""
        stamp = "" if self._in_journal else f"[{_stamp(int(record.created))}] "
        message = record.message
        if record.name.startswith("imageserver"):  # gunicorn's may have several lines on purpose
            message = _printable(message)
        pairs = (
            _pairs_of(vars(record)[FIELDS])
            if isinstance(record, _Finished)
            else "".join([f" {key}={_plain(value)}" for key, value in _fields_of(record).items()])
        )
        return f"{stamp}[{record.process}] [{record.levelname}] {message}{pairs}"

    def format(self, record: logging.LogRecord) -> str:
        """Write a record."""
        is_finished = isinstance(record, _Finished)
        text = self.formatMessage(record) if is_finished else super().format(record)
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
    found: Mapping[str, object] | Entry = getattr(record, FIELDS, {})
    return _told(found) if isinstance(found, Entry) else found


def _printable(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _time(seconds: float) -> str:
    whole, milliseconds = divmod(int(seconds * 1000), 1000)
    day, moment, zone = _stamp(whole).split()
    return f"{day}T{moment}.{milliseconds:03}{zone[:3]}:{zone[3:]}"


@lru_cache(maxsize=2)  # two: threads need not be within the same second
def _stamp(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(seconds))


def _plain(value: object) -> str:
    return "-" if value is None or value == "" else _quoted(str(value))


@lru_cache(maxsize=1024)  # transfers, operations and clients come again
def _quoted(text: str) -> str:
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
            log.handle(_Finished(level, entry))


class _Finished(logging.LogRecord):
    """The record of a finished operation, made without looking for its caller and its thread.

    logging takes longer over these than over all else of a line.
    """

    def __init__(self, level: int, entry: Entry) -> None:
        vars(self).update(_BLANK)
        self.created = now = time.time()
        self.msecs = now * 1000 % 1000
        self.levelno, self.levelname = level, logging.getLevelName(level)
        self.message = self.msg
        self.process = _pid()
        vars(self)[FIELDS] = entry


#: What every such record has.
_BLANK = vars(logging.LogRecord(log.name, logging.INFO, __file__, 0, "finished", (), None))


@cache
def _pid() -> int:
    return os.getpid()


os.register_at_fork(after_in_child=_pid.cache_clear)


def _pairs_of(entry: Entry) -> str:
    """Return ``_told`` as ``_Text`` writes it, but for what is always plain."""
    _, transfer, op, _, span, done, status, error, detail, seconds, client, request = entry
    return (
        f" transfer={_plain(transfer)} op={_plain(op)}"
        f" range={f'{span.start}-{span.stop - 1}' if span and span.length else '-'}"
        f" bytes={done} status={status}"
        f" seconds={round(seconds, 6)} rate={round(done / seconds) if seconds else 0}"
        f" worker={_pid()} client={_plain(client)} request={request or '-'}"
        + (f" error={_plain(error)} detail={_plain(detail)}" if error else "")
    )


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
        "worker": _pid(),
        "client": entry.client,
        "request": entry.request,
    }
    if entry.error:
        told |= {"error": entry.error, "detail": entry.detail}
    return told
