# SPDX-License-Identifier: Apache-2.0
"""imagectl and servers that answer what they should not, and outputs that take nothing."""

import contextlib
import http.server
import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.system.harness import ROOT, repeatable
from tests.system.moving import IMAGECTL, MIB, imagectl
from tests.system.threads import serving

DATA = repeatable("answers").randbytes(2 * MIB)


class Liar(http.server.ThreadingHTTPServer):
    """An image server that is right but for what a test has it say."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.extents: bytes = json.dumps(
            [{"start": 0, "length": len(DATA), "zero": False, "dirty": True}]
        ).encode()
        self.size = len(DATA)
        #: Answers a range in its own way: gets the handler, start and stop.
        self.ranged: Callable[[_Handler, int, int], None] = _ranged
        self.asked = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/images/x"


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Liar

    def log_message(self, *_arguments: object) -> None:
        pass

    def head(self, status: int, *fields: tuple[str, object]) -> None:
        self.send_response(status)
        for name, value in fields:
            self.send_header(name, str(value))
        self.end_headers()

    def say(self, status: int, body: bytes, *fields: tuple[str, object]) -> None:
        self.head(status, ("Content-Length", len(body)), *fields)
        self.wfile.write(body)

    def do_OPTIONS(self) -> None:
        features = {"features": ["extents", "zero"], "max_readers": 2, "max_writers": 2}
        self.say(200, json.dumps(features).encode(), ("Allow", "GET, HEAD, OPTIONS"))

    def do_HEAD(self) -> None:
        self.head(200, ("Content-Length", self.server.size))

    def do_GET(self) -> None:
        if "/extents" in self.path:
            self.say(200, self.server.extents)
            return
        span = re.fullmatch("bytes=([0-9]+)-([0-9]+)", self.headers["Range"])
        assert span
        self.server.asked += 1
        with contextlib.suppress(ConnectionError):
            self.server.ranged(self, int(span[1]), int(span[2]) + 1)


def _place(start: int, stop: int) -> tuple[str, str]:
    return "Content-Range", f"bytes {start}-{stop - 1}/{len(DATA)}"


def _ranged(handler: _Handler, start: int, stop: int) -> None:
    handler.say(206, DATA[start:stop], _place(start, stop))


@pytest.fixture
def liar() -> Iterator[Liar]:
    server = Liar()
    with serving(server):
        yield server


def fetch(liar: Liar, file: Path, *options: object, status: int = 1) -> str:
    """Download, which must end so; return what was said."""
    return imagectl(
        "download", liar.url, file, "-q", "--patience", 1, *options, status=status
    ).stderr


@pytest.mark.parametrize("dirty", [{}, {"dirty": 1}], ids=["none", "a number"])
def test_what_is_not_said_to_be_clean_is_not_taken_to_be(liar, tmp_path, dirty):
    liar.extents = json.dumps([{"start": 0, "length": len(DATA), "zero": False} | dirty]).encode()
    old = tmp_path / "old"
    old.write_bytes(bytes(len(DATA)))
    assert fetch(liar, old, "--incremental") == (
        "imagectl: the extent at 0 does not tell whether it is dirty\n"
    )


def nowhere(handler: _Handler, start: int, stop: int) -> None:
    handler.say(206, DATA[start:stop])


def elsewhere(handler: _Handler, start: int, stop: int) -> None:
    handler.say(206, DATA[start:stop], _place(start + 1, stop + 1))


def beyond(handler: _Handler, start: int, stop: int) -> None:
    handler.say(206, DATA[start:stop], ("Content-Range", f"bytes {start}-{stop - 1}/{stop - 1}"))


def in_parts(handler: _Handler, start: int, stop: int) -> None:
    fields = _place(start, stop), ("Content-Type", "multipart/byteranges; boundary=B")
    handler.say(206, DATA[start:stop], *fields)


def chunked(handler: _Handler, start: int, stop: int) -> None:
    handler.head(206, _place(start, stop), ("Transfer-Encoding", "chunked"))
    handler.wfile.write(b"%x\r\n%b\r\n0\r\n\r\n" % (stop - start, DATA[start:stop]))


def endless(handler: _Handler, start: int, stop: int) -> None:
    handler.head(206, _place(start, stop), ("Connection", "close"))
    handler.wfile.write(DATA[start:stop] + b"more")


def short(handler: _Handler, start: int, stop: int) -> None:
    handler.say(206, DATA[start : stop - 1], _place(start, stop))


def packed(handler: _Handler, start: int, stop: int) -> None:
    handler.say(206, DATA[start:stop], _place(start, stop), ("Content-Encoding", "gzip"))


@pytest.mark.parametrize(
    ("ranged", "sentence"),
    [
        (nowhere, "with a range, but does not say which"),
        (elsewhere, "with another range: has the image become smaller?"),
        (beyond, "with a range that ends beyond its image"),
        (in_parts, "one range with several parts"),
        (chunked, "{count} bytes without a Content-Length"),
        (endless, "{count} bytes without a Content-Length"),
        (short, "{count} bytes with {less}"),
        (packed, "with an encoding that was not asked for"),
    ],
)
def test_a_range_must_be_the_one_that_was_asked_for(liar, tmp_path, ranged, sentence):
    liar.ranged = ranged
    count = len(DATA)
    wanted = sentence.format(count=count, less=count - 1)
    assert fetch(liar, tmp_path / "f", "-n", 1) == f"imagectl: the server answered {wanted}\n"
    assert not (tmp_path / "f").exists()


def test_the_whole_image_in_place_of_a_range_is_not_printed(liar, tmp_path):
    liar.ranged = lambda handler, _start, _stop: handler.say(200, b"secret " * MIB)
    assert fetch(liar, tmp_path / "f", status=3) == (
        f"imagectl: 127.0.0.1:{liar.server_port} answered GET with 200, which was not asked for\n"
    )


def test_connections_that_are_cut_early_add_up(liar, tmp_path):
    """Each brings less than one read: what has come counts all the same."""

    def cut(handler: _Handler, start: int, stop: int) -> None:
        handler.head(206, _place(start, stop), ("Content-Length", stop - start))
        handler.wfile.write(DATA[start : min(stop, start + 300_000)])
        handler.close_connection = True

    liar.ranged = cut
    fetch(liar, tmp_path / "f", "--patience", 20, "-n", 1, status=0)
    assert (tmp_path / "f").read_bytes() == DATA
    assert 7 <= liar.asked < 30  # seven ranges, then samples, for connections broke


@pytest.mark.parametrize(
    ("extents", "sentence"),
    [
        (b'[{"start":0,"length":%d,"zero":true}]' % 2**70, "an extent at 0 ends beyond any image"),
        (b"[" * 100_000 + b"{}", "the list of extents is no JSON: "),
    ],
    ids=["huge", "deep"],
)
def test_strange_extents_are_told_in_a_sentence(liar, tmp_path, extents, sentence):
    liar.extents = extents
    assert fetch(liar, tmp_path / "f").startswith(f"imagectl: {sentence}")


def test_a_size_that_no_image_has_is_told_in_a_sentence(liar, tmp_path):
    liar.size = 2**65
    assert fetch(liar, tmp_path / "f") == "imagectl: the server tells a size that no image has\n"


@pytest.mark.parametrize(
    ("redirected", "status", "said"),
    [
        (">&-", 5, "imagectl: the output cannot be written: Bad file descriptor\n"),
        ("2>&-", 0, ""),
        (">&- 2>&-", 5, ""),
        ("2>/dev/full", 0, ""),
        (
            ">/dev/full",
            5,
            "imagectl: the output cannot be written: No space left on device\n",
        ),
        ("> >(exec >&- <&-; echo gone >{gone})", 141, ""),
    ],
)
@pytest.mark.parametrize("form", ["", "--json"])
def test_outputs_that_take_nothing_cost_no_image(liar, tmp_path, redirected, status, said, form):
    file, gone = tmp_path / "f", tmp_path / "gone"
    wait = f"until test -e {gone}; do sleep 0.05; done; " if "gone" in redirected else ""
    command = f"exec {' '.join(IMAGECTL)} download {liar.url} {file} {form}"
    script = f"exec {redirected.format(gone=gone)}; {wait}{command}"
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (status, said)
    assert file.read_bytes() == DATA


@pytest.mark.parametrize("scheme", ["http", "ftp"])
def test_a_password_in_a_url_is_not_shown(tmp_path, scheme):
    url = f"{scheme}://me:secret@127.0.0.1:1/x"
    said = imagectl("info", url, status={"http": 1, "ftp": 2}[scheme]).stderr
    assert ("secret" in said, "127.0.0.1:1" in said) == (False, True)


@pytest.mark.parametrize("command", [["info"], ["check"], ["top", "--once"]], ids=lambda c: c[0])
@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://[::1", "no URL: its host or port is wrong"),
        ("http://x:99999/", "no URL: its host or port is wrong"),
        ("http://127.0.0.1:abc/", "no URL: its host or port is wrong"),
        ("http://exa mple/", "no URL: its host or port is wrong"),
        ("http://a..b/", "no URL: its host or port is wrong"),
        ("ftp://x/y", "no http:// or https:// URL"),
    ],
)
def test_what_is_no_url_is_a_wrong_argument(command, url, why):
    assert imagectl(*command, url, status=2).stderr == f"imagectl: {url!r} is {why}\n"


@pytest.mark.parametrize(
    "option", ["--timeout=1e10", "--timeout=inf", "--timeout=nan", "--patience=nan"]
)
def test_times_that_are_none_are_wrong_arguments(tmp_path, option):
    said = imagectl("download", "http://x/", tmp_path / "f", option, status=2).stderr
    assert f"Invalid value for '{option.partition('=')[0]}'" in said


def test_debug_may_come_before_the_command():
    said = imagectl("--debug", "info", "http://127.0.0.1:1/x", status=1).stderr
    assert (said.startswith("Traceback"), said.splitlines()[-1]) == (
        True,
        "imagectl: cannot connect to 127.0.0.1:1: Connection refused",
    )


def test_help_lists_the_exit_statuses():
    said = imagectl("--help").stdout.partition("Exit status:\n")[2]
    assert [line.split()[0] for line in said.splitlines()] == [
        "0",
        "1",
        "2",
        "3",
        "4",
        "5",
        "130",
        "141",
    ]


def test_a_distributions_old_package_is_told_from_a_defect(tmp_path, monkeypatch):
    (tmp_path / "urllib3.py").write_text("__version__ = '1.26.12'\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    said = imagectl("info", "http://x/", status=5).stderr
    assert (said.count("\n"), said[:36]) == (1, "imagectl: urllib3 1.26.12 is too old")


def test_what_a_server_says_does_nothing_to_a_terminal(liar, tmp_path):
    def refuse(handler: _Handler, _start: int, _stop: int) -> None:
        evil = "no\x1b[2J\x1b]0;title\x07\nreally\u202e" + "x" * 4000
        handler.say(403, json.dumps({"error": evil}).encode())

    liar.ranged = refuse
    said = fetch(liar, tmp_path / "f", status=3)
    assert re.fullmatch(
        r"imagectl: \S+ answered GET with 403: no\?\[2J\?\]0;title\?\?really\?x{250,300}\n", said
    )
