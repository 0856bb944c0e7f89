# SPDX-License-Identifier: Apache-2.0
"""The benchmark's client and rows: no figure without requests, nor from wrong answers."""

import contextlib
import re
import socket
import threading
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from benchmark.__main__ import ROWS, named
from benchmark.cases import Case, Place
from benchmark.client import Job, head
from benchmark.clients import ClientFailed, Clients
from benchmark.rows_cpu import calls
from benchmark.rows_requests import CASES
from benchmark.shares import NAMES, PARTS, Cost, draw, shares
from lab.model import WrongBytes
from lab.processes import LabFailed

from tests.system.harness import ROOT

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ndone"
SCRIPTS = str(ROOT / "scripts")


class Scripted:
    """A server that answers each request on each connection with the same bytes."""

    def __init__(self, answer: bytes):
        self.answer = answer
        self.received: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=[sock], daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, sock.makefile("rb") as stream:
            while request := b"".join(takewhile(b"\r\n".__ne__, stream)):
                if length := re.search(rb"Content-Length: ([0-9]+)", request):
                    request += stream.read(int(length[1]))
                self.received.append(request)
                sock.sendall(self.answer)
                if len(self.answer.partition(b"\r\n\r\n")[2]) != 4:
                    return

    def close(self) -> None:
        with contextlib.suppress(OSError):  # closed before
            self._listener.shutdown(socket.SHUT_RDWR)  # a thread in accept(2) keeps it open
        self._listener.close()


@pytest.fixture
def serve() -> Iterator[Callable[[bytes], Scripted]]:
    servers = []

    def started(answer: bytes) -> Scripted:
        servers.append(Scripted(answer))
        return servers[-1]

    yield started
    for server in servers:
        server.close()


@pytest.fixture(scope="module")
def clients() -> Iterator[Clients]:
    with pytest.MonkeyPatch.context() as patch, contextlib.closing(Clients()) as running:
        patch.setenv("PYTHONPATH", SCRIPTS)
        yield running


def job(port: int, **more: object) -> Job:
    return replace(Job(port, [head("GET", "/images/x")]), **more)


# The client


def test_requests_of_all_connections_are_counted(serve, clients: Clients):
    outcome = clients.run([job(serve(OK).port, count=3)] * 2)
    assert (outcome.requests, outcome.received) == (6, 24)
    assert outcome.seconds > 0
    assert outcome.requests_per_second == 6 / outcome.seconds


def test_time_that_is_over_at_once_is_enough_for_one_request(serve, clients: Clients):
    assert clients.run([job(serve(OK).port, seconds=1e-9)]).requests == 1


def test_an_answer_without_a_length_ends_with_its_connection(serve, clients: Clients):
    port = serve(b"HTTP/1.1 200 OK\r\n\r\nall of it").port
    assert clients.run([job(port)]).received == 9


@pytest.mark.parametrize(
    ("answer", "more", "why"),
    [
        (OK, {"status": 206}, "WrongAnswer: HTTP/1.1 200"),
        (OK, {"size": 5}, "WrongAnswer: 4 bytes instead of 5"),
        (OK[:-1], {}, "WrongAnswer: the answer ended after 3 bytes of 4"),
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n", {}, "WrongAnswer: HTTP/1.1 503"),
        (OK, {"count": 0}, "a client made no request"),
    ],
    ids=["status", "size", "cut off", "refusal", "none"],
)
def test_what_is_not_as_the_job_says_is_no_figure(
    serve, clients: Clients, answer: bytes, more: dict[str, object], why: str
):
    with pytest.raises(ClientFailed, match=why):
        clients.run([job(serve(answer).port, **{"size": 4} | more)])


def test_a_server_that_is_not_there_is_no_figure_and_the_next_run_goes_on(serve, clients: Clients):
    server = serve(OK)
    server.close()
    with pytest.raises(ClientFailed, match="ConnectionRefusedError"):
        clients.run([job(server.port)])
    assert clients.run([job(serve(OK).port)]).requests == 1


def test_a_body_arrives_behind_its_head(serve, clients: Clients, tmp_path: Path):
    source = tmp_path / "source"
    source.write_bytes(bytes(range(256)) * 64)
    server = serve(OK)
    request = head("PUT", "/images/x", Content_Length=5000)
    told = Job(server.port, [request], file=str(source), offset=100, length=5000, count=2)
    clients.run([told])
    assert server.received == [request.encode()[:-2] + source.read_bytes()[100:5100]] * 2


# The cases


def test_requests_of_a_case_are_the_same_for_everybody_and_within_the_image():
    case = Case("GET", 4096, 1)
    places = case.places(0, 1 << 20)
    assert places == case.places(0, 1 << 20) != case.places(1, 1 << 20)
    assert all(0 <= place <= (1 << 20) - 4096 and place % 4096 == 0 for place in places)


@pytest.mark.parametrize(
    ("case", "request_"),
    [
        (Case("GET", 10, 1), "GET /x HTTP/1.1\r\nHost: bench\r\nRange: bytes=20-29\r\n\r\n"),
        (
            Case("PUT", 10, 1),
            (
                "PUT /x?flush=n HTTP/1.1\r\nHost: bench\r\nContent-Length: 10\r\n"
                "Content-Range: bytes 20-29/*\r\n\r\n"
            ),
        ),
        (
            Case("zero", 10, 1),
            (
                "PATCH /x HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
                'Content-Length: 35\r\n\r\n{"op":"zero","offset":20,"size":10}'
            ),
        ),
        (
            Case("flush", 0, 1),
            (
                "PATCH /x HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
                'Content-Length: 14\r\n\r\n{"op":"flush"}'
            ),
        ),
        (Case("OPTIONS", 0, 1), "OPTIONS /x HTTP/1.1\r\nHost: bench\r\n\r\n"),
    ],
    ids=lambda value: value.kind if isinstance(value, Case) else "",
)
def test_a_case_asks_for_what_it_says(case: Case, request_: str):
    assert case.request("/x", 20) == request_


def test_zeros_that_are_not_there_are_no_figure(serve, clients: Clients, tmp_path: Path):
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    server = serve(OK)
    with pytest.raises(WrongBytes, match=r"^PATCH zero of 64 KiB, 1 connection of /x"):
        Case("zero", 65536, 1).measure(clients, Place(server.port, "/x", image, image), 0.01)


def test_the_table_has_each_line_of_its_own():
    assert len({str(case) for case in CASES}) == len(CASES) == 19
    assert all(case.target for case in CASES)


# System calls

SUMMARY = """\
strace: Process 12 attached
% time     seconds  usecs/call     calls    errors syscall
------ ----------- ----------- --------- --------- ----------------
 60.00    0.000600           3       200           recvfrom
 40.00    0.000400           4       100        99 newfstatat
------ ----------- ----------- --------- --------- ----------------
100.00    0.001000           3       300        99 total
"""


def test_system_calls_are_counted_with_their_errors():
    assert calls(SUMMARY) == {"recvfrom": 200, "newfstatat": 100}


@pytest.mark.parametrize("summary", ["", SUMMARY.splitlines()[0], SUMMARY.splitlines()[-1]])
def test_no_system_calls_are_no_figure(summary: str):
    with pytest.raises(LabFailed, match=r"^strace has counted nothing"):
        calls(summary)


# Where the time goes

SERVES = "run (threading.py:1);Threads._run (imageserver/server/threads.py:2)"
SERVES += ";serve (imageserver/server/exchange.py:3)"
STACKS = f"""\
{SERVES};poll (falcon/app.py:4);Link.read (imageserver/backends/nbd/link.py:5);poll (nbd.py:6) 6
{SERVES};poll (falcon/app.py:4);dumps (json/__init__.py:7) 2
{SERVES};Wire.send (imageserver/server/wire.py:8) 2
{SERVES};Wire.recv_into (imageserver/server/wire.py:8);wait (threading.py:9) 50
run (threading.py:1);Threads._run (imageserver/server/threads.py:2) 70
"""


def test_samples_count_for_the_innermost_part_and_waiting_for_none():
    assert {name: share for name, share in shares(STACKS).items() if share} == {
        "NBD": 0.6,
        "Falcon": 0.2,
        "receiving and sending": 0.2,
    }


def test_no_samples_of_requests_are_no_drawing():
    with pytest.raises(LabFailed, match=r"^py-spy has seen no request$"):
        shares(STACKS.splitlines()[-1])


def test_bars_are_as_long_as_requests_take_time():
    found = [Cost("GET", 4e-4, shares(STACKS)), Cost("PUT", 8e-4, shares(STACKS))]
    root = ET.fromstring(draw(found))  # noqa: S314 - our own
    bars = [each for each in root.iter("{http://www.w3.org/2000/svg}rect") if len(each)]
    widths = [float(bar.attrib["width"]) for bar in bars]
    assert len(bars) == 2 * len(NAMES)
    assert sum(widths[len(NAMES) :]) == pytest.approx(2 * sum(widths[: len(NAMES)]), abs=1)
    assert "NBD: 240 µs" in [bar[0].text for bar in bars]


def test_each_part_has_modules():
    files = [str(path.relative_to(ROOT)) for path in (ROOT / "imageserver").rglob("*.py")]
    files += ["nbd.py", "filelock/_api.py", "gunicorn/util.py", "falcon/app.py"]
    unused = [start for start in PARTS if not any(file.startswith(start) for file in files)]
    assert unused == []
    assert set(PARTS.values()) == set(NAMES)


# The rows


def test_rows_are_chosen_by_their_name_or_its_first_words():
    rows = ["requests-get", "requests-put", "requests-other", "requests-raw"]
    assert named("requests") == rows
    assert named("requests-put") == ["requests-put"]
    assert [named(name) for name in ROWS if "-" not in name] == [
        [name] for name in ROWS if "-" not in name
    ]
    with pytest.raises(ArgumentTypeError, match=r"^no row req; --list names them$"):
        named("req")


def test_the_documentation_has_each_row():
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    table = text.partition("## The rows\n")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `([a-z0-9-]+)` \|", table, re.MULTILINE)) == set(ROWS)
