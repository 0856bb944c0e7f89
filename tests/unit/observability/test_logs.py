# SPDX-License-Identifier: Apache-2.0
"""Where the log goes: once to standard error, with a time stamp unless the journal has its own."""

import io
import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from imageserver.core.entry import Entry, fields
from imageserver.core.ranges import Span
from imageserver.observability import logs

_SCRIPT = """
import logging, os, sys
from imageserver.observability import logs
for level in sys.argv[1:]:
    logs.configure(level)
logging.getLogger("imageserver.web").info("hello")
logging.getLogger("imageserver.web").warning("careful")
logging.getLogger("elsewhere").warning("not ours")
"""
_STAMP = r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}\] "


def _log(*levels: str, **environ: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, *levels],
        env=environ,
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    assert done.stdout == ""
    return [re.sub(r"\[\d+\] ", "[pid] ", line) for line in done.stderr.splitlines()]


def test_a_line_has_a_time_a_process_and_a_level() -> None:
    lines = _log("warning")

    assert re.fullmatch(_STAMP + re.escape("[pid] [WARNING] careful"), lines[0])


def test_the_journal_gets_no_time_stamps() -> None:
    lines = _log("info", JOURNAL_STREAM="9:12345")

    assert lines == ["<6>[pid] [INFO] hello", "<4>[pid] [WARNING] careful", "not ours"]


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        pytest.param(["debug"], ["hello", "careful"], id="debug"),
        pytest.param(["warning"], ["careful"], id="warning"),
        pytest.param(["error"], [], id="error"),
        pytest.param(["info", "warning"], ["careful"], id="raised-by-a-second-call"),
        pytest.param(["error", "info"], ["hello", "careful"], id="lowered-by-a-second-call"),
    ],
)
def test_the_last_level_counts_and_each_line_comes_once(
    levels: list[str], expected: list[str]
) -> None:
    lines = _log(*levels, JOURNAL_STREAM="9:12345")

    assert [line.rpartition("] ")[2] for line in lines] == [*expected, "not ours"]


def test_nothing_is_configured_unasked() -> None:
    assert _log(JOURNAL_STREAM="9:12345") == ["careful", "not ours"]


_ENTRY = {
    "method": "GET",
    "transfer": "vda",
    "operation": "read",
    "backend": "nbd",
    "span": Span(0, 1024, 4096),
    "done": 1024,
    "status": 206,
    "error": "",
    "detail": "",
    "seconds": 0.5,
    "client": "127.0.0.1",
    "request": "r1",
}


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What the package logs, without a time; the handlers are pytest's again afterwards."""
    monkeypatch.setenv("JOURNAL_STREAM", "9:12345")
    logger, written = logging.getLogger("imageserver"), io.StringIO()
    monkeypatch.setattr(logger, "handlers", [logging.StreamHandler(written)])
    yield written
    logger.setLevel(logging.NOTSET)
    logger.propagate = True


def _operation(style: str, level: str = "info", **fields: object) -> None:
    logs.configure(level, style)
    logs.OperationLog().finished(Entry(**(_ENTRY | fields)))  # type: ignore[arg-type]


def test_an_operation_is_one_line_of_fields(stream: io.StringIO) -> None:
    _operation("text")

    pid = os.getpid()
    assert stream.getvalue() == (
        f"<6>[{pid}] [INFO] finished transfer=vda op=read range=0-1023 bytes=1024 status=206 "
        f"seconds=0.5 rate=2048 worker={pid} client=127.0.0.1 request=r1\n"
    )


def test_an_operation_is_one_json_object(stream: io.StringIO) -> None:
    _operation("json")

    assert json.loads(stream.getvalue().removeprefix("<6>")) == {
        "level": "info",
        "worker": os.getpid(),
        "message": "finished",
        "transfer": "vda",
        "op": "read",
        "range": "0-1023",
        "bytes": 1024,
        "status": 206,
        "seconds": 0.5,
        "rate": 2048,
        "client": "127.0.0.1",
        "request": "r1",
    }


@pytest.mark.parametrize(
    "entry",
    [
        {},
        {"span": None, "transfer": "", "backend": "", "request": "", "client": ""},
        {"span": Span(5, 5, 9), "seconds": 0.0, "done": 0},
        {"error": "ImageBusy", "detail": "", "transfer": 'a "b"', "operation": "x y"},
        {"error": "BackendError", "detail": "a b=c", "seconds": 0.00001234567, "client": "::1%a b"},
    ],
)
def test_text_has_the_fields_of_json(stream: io.StringIO, entry: dict[str, object]) -> None:
    _operation("text", **entry)
    _operation("json", **entry)

    line, json_line = stream.getvalue().splitlines()
    fields = json.loads(json_line.partition(">")[2])
    del fields["level"], fields["message"]
    order = ["transfer", "op", "range", "bytes", "status", "seconds", "rate", "worker", "client"]
    order += [key for key in ("request", "error", "detail") if key in fields]
    told = "".join(f" {key}={logs._plain(fields.pop(key))}" for key in order)
    assert not fields
    assert line.partition(" finished")[2] == told


@pytest.mark.parametrize(
    ("transfer", "written"),
    [
        ("a b", '"a b"'),
        ("a\nlevel=x", '"a\\nlevel=x"'),
        ('say"hi"', '"say\\"hi\\""'),
        ("a=b", '"a=b"'),
        ("\u2028ü", '"\\u2028\\u00fc"'),
        ("", "-"),
    ],
)
def test_no_field_can_forge_another_or_a_line(
    stream: io.StringIO, transfer: str, written: str
) -> None:
    _operation("text", transfer=transfer)

    assert f" finished transfer={written} op=read " in stream.getvalue()
    assert stream.getvalue().count("\n") == 1


@pytest.mark.parametrize("style", ["text", "json"])
def test_no_message_can_forge_a_line(stream: io.StringIO, style: str) -> None:
    logs.configure("info", style)
    logging.getLogger("imageserver.web").warning("path=%s", "a\n[1] [INFO] b\x1b[2J\u2028")

    assert stream.getvalue().count("\n") == 1
    assert stream.getvalue().rstrip("\n").isprintable()


@pytest.mark.parametrize(
    ("fields", "level"),
    [
        ({}, "INFO"),
        ({"operation": "options"}, "DEBUG"),
        ({"operation": "head"}, "DEBUG"),
        ({"status": 404, "error": "UnknownImage"}, "INFO"),
        ({"status": 503, "error": "NoSlot"}, "INFO"),
        ({"status": 500, "error": "FileAccessError"}, "WARNING"),
        ({"status": 504, "error": "BackendTimeout"}, "WARNING"),
        ({"status": 507, "error": "NoSpace"}, "WARNING"),
        ({"status": 206, "error": "BackendError"}, "WARNING"),
        ({"status": 200, "error": "ClientGone"}, "INFO"),
    ],
)
def test_what_an_operator_must_see_is_a_warning_and_probes_are_for_debugging(
    stream: io.StringIO, fields: dict[str, object], level: str
) -> None:
    _operation("text", "debug", **fields)

    assert f"[{level}] finished " in stream.getvalue()
    error = fields.get("error")
    assert (f" error={error} detail=-" in stream.getvalue()) == bool(error)


def test_a_probe_is_not_logged_unless_asked_for(stream: io.StringIO) -> None:
    _operation("text", operation="options")

    assert stream.getvalue() == ""


def _fail() -> None:
    try:
        _ = 1 / 0
    except ZeroDivisionError:
        logging.getLogger("imageserver.web").exception("failed")


def test_every_line_of_a_traceback_has_its_priority(stream: io.StringIO) -> None:
    logs.configure("info")
    _fail()

    lines = stream.getvalue().splitlines()
    assert len(lines) > 2
    assert {line[:3] for line in lines} == {"<3>"}


def test_a_traceback_is_part_of_its_json_object(stream: io.StringIO) -> None:
    logs.configure("info", "json")
    _fail()

    found = json.loads(stream.getvalue().removeprefix("<3>"))
    assert found["message"] == "failed"
    assert found["traceback"].endswith("ZeroDivisionError: division by zero")


def test_json_has_the_time_unless_the_journal_adds_it(
    stream: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JOURNAL_STREAM")
    _operation("json")

    time = json.loads(stream.getvalue())["time"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d", time)


def test_the_time_is_that_of_the_line_and_not_of_one_before(
    stream: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    for seconds in (1_700_000_000.0, 1_700_000_000.999, 1_700_000_001.0, 1_700_000_000.5):
        clock = SimpleNamespace(**vars(time) | {"time": lambda now=seconds: now})
        monkeypatch.setattr(logs, "time", clock)
        _operation("text")

    stamps = [re.search(r":(\d\d) [+-]", line) for line in stream.getvalue().splitlines()]
    assert [found and found[1] for found in stamps] == ["20", "20", "21", "20"]


def test_the_record_of_an_operation_has_all_that_logging_gives_one(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("imageserver")
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level("INFO", logger="imageserver")
    before = time.time()
    logs.OperationLog().finished(Entry(**{**_ENTRY, "operation": "read"}))
    logging.getLogger("imageserver.observability.logs").info("finished", extra=fields(a=1))

    ours, usual = caplog.records
    assert vars(ours).keys() == vars(usual).keys()
    assert (ours.name, ours.getMessage(), ours.levelname) == (usual.name, "finished", "INFO")
    assert (ours.process, ours.exc_info) == (os.getpid(), None)
    assert before <= ours.created <= usual.created


def test_a_forked_child_logs_its_own_pid(stream: io.StringIO) -> None:
    _operation("text")
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        _operation("text")
        os.write(theirs, stream.getvalue().encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(theirs)
    with open(ours, encoding="utf-8") as told:
        last = told.read().splitlines()[-1]

    assert f"[{child}] " in last
    assert f" worker={child} " in last
