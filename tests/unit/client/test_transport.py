# SPDX-License-Identifier: Apache-2.0
"""Servers that are none, that drip, or do not say that it is done: what is believed."""

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from imageserver.client.backoff import RetryBudget, retried_while_busy
from imageserver.client.checking import probe
from imageserver.client.checking.probe import Connection, Request
from imageserver.client.failures import Broken, ClientError, Failed, Transient, Unreachable
from imageserver.client.http import connections
from imageserver.client.http.access import Access
from imageserver.client.http.remote import Remote
from imageserver.client.moving.movers import Movers
from imageserver.client.pace import LEAST_RATE, Pace, Slow
from imageserver.client.plan import Piece

#: What is served until the connection is closed, and whether a head was read before.
Serve = Callable[[socket.socket], object]


@contextlib.contextmanager
def port(serve: Serve, host: str = "127.0.0.1") -> Iterator[int]:
    """Listen; each connection is served by ``serve``, and closed."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    ended = threading.Event()

    def accept() -> None:
        while not ended.is_set():
            try:
                connection = listener.accept()[0]
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                serve(connection)

    with socket.create_server((host, 0), family=family) as listener:
        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            ended.set()
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def remote(number: int, scheme: str = "http", seconds: float = 0.3) -> Remote:
    return Remote(Access(f"{scheme}://127.0.0.1:{number}/images/x", timeout_seconds=seconds), 1)


def says(*pieces: bytes, pause: float = 0.0) -> Serve:
    """Answer whatever comes first with these pieces."""

    def serve(connection: socket.socket) -> None:
        connection.recv(65536)
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(pause)

    return serve


def answer(body: bytes, *fields: str, status: int = 200) -> bytes:
    head = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", *fields, "", ""]
    return "\r\n".join(head).encode() + body


def failure(serve: Serve, action: Callable[[Remote], object], **access: object) -> ClientError:
    """Return what an action against such a server raises."""
    with port(serve) as number, contextlib.closing(remote(number, **access)) as image:  # type: ignore[arg-type]
        with pytest.raises(ClientError) as raised:
            action(image)
        return raised.value


# What is no server


@pytest.mark.parametrize(
    "text", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-x\r\n", b"\0" * 99]
)
def test_a_port_that_does_not_speak_tls_is_asked_once(text: bytes):
    found = failure(says(text), Remote.abilities, scheme="https", seconds=5)
    assert (type(found), str(found)[:26]) == (Failed, "no TLS with 127.0.0.1:" + str(found)[22:26])


def test_a_handshake_that_is_cut_is_no_connection():
    found = failure(says(), Remote.abilities, scheme="https", seconds=5)
    assert (type(found), "no TLS with" in str(found)) == (Unreachable, True)


@pytest.mark.parametrize(
    "ask",
    [
        lambda access: retried_while_busy(Remote(access, 1).abilities, 60),
        lambda access: Connection(access).__enter__(),
    ],
    ids=["info", "check"],
)
def test_a_port_that_waits_for_more_than_a_handshake_is_given_up(
    monkeypatch: pytest.MonkeyPatch, ask: Callable[[Access], object]
):
    """As one for HTTP does: a handshake may look like the beginning of a head."""
    for module in (connections, probe):
        monkeypatch.setattr(module, "HANDSHAKE_SECONDS", 0.2)
    ended = threading.Event()
    with port(lambda _connection: ended.wait(10)) as number:
        began = time.monotonic()
        with pytest.raises(Unreachable):
            ask(Access(f"https://127.0.0.1:{number}/images/x"))
        assert time.monotonic() - began < 5
        ended.set()


@pytest.mark.parametrize("text", [b"SSH-2.0-OpenSSH_9\r\n", b"x" * 70000, b"HTTP/x.y 200\r\n\r\n"])
def test_a_port_that_does_not_speak_http_is_asked_once(text: bytes):
    found = failure(says(text), Remote.abilities, seconds=5)
    assert (type(found), "does not speak HTTP" in str(found)) == (Failed, True)
    assert len(str(found)) < 400


def test_a_connection_that_is_closed_without_an_answer_is_asked_again():
    assert type(failure(says(), Remote.abilities)) is Broken


def resets(connection: socket.socket) -> None:
    """Close with bytes unread, as a server does that has seen no TLS."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.recv(1)


@pytest.mark.parametrize("serve", [says(), resets], ids=["closed", "reset"])
def test_a_port_that_has_never_answered_may_speak_tls(serve: Serve):
    found = failure(serve, Remote.abilities, seconds=5)
    assert str(found).endswith(" (does this port speak TLS? then say https://)")


def test_a_port_that_has_answered_is_not_said_to_speak_tls():
    answers = iter([says(answer(b"", "Connection: close")), says()])

    def serve(connection: socket.socket) -> None:
        next(answers)(connection)

    def ask_twice(image: Remote) -> None:
        with pytest.raises(Failed, match="was answered with nothing"):
            image.abilities()
        image.abilities()

    found = failure(serve, ask_twice, seconds=5)
    assert (type(found), "TLS" in str(found)) == (Broken, False)


# What drips


def drip(head: bytes, drop: bytes) -> Serve:
    """Send a byte now and then, sooner than the timeout, for ever."""

    def serve(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(head)
        while True:
            connection.sendall(drop)
            time.sleep(0.02)

    return serve


_RANGE = "Content-Range: bytes 0-999999/1000000"
_LONG = f"HTTP/1.1 206 X\r\nContent-Length: 1000000\r\n{_RANGE}\r\n\r\n".encode()
_JSON = b"HTTP/1.1 200 X\r\nContent-Length: 1000000\r\n\r\n"


@pytest.mark.parametrize(
    ("head", "action"),
    [
        (b"HTTP/1.1 200 X\r\nX-Drip: ", Remote.abilities),
        (_JSON, Remote.abilities),
        (_JSON, lambda image: list(image.extents())),
        (_JSON, lambda image: image.zero(0, 1)),
        (_LONG, lambda image: list(image.read(0, 1_000_000))),
    ],
    ids=["a head", "a body", "extents", "what a command is answered with", "data"],
)
def test_what_drips_is_given_up(head: bytes, action: Callable[[Remote], object]):
    found = failure(drip(head, b"x"), action)
    assert isinstance(found, Broken | Failed)
    if isinstance(found, Broken):
        assert f"less than {LEAST_RATE} bytes per second" in str(found)


def test_a_check_gives_up_what_drips():
    with port(drip(b"HTTP/1.1 200 X\r\nX-Drip: ", b"x")) as number:
        access = Access(f"http://127.0.0.1:{number}/images/x", timeout_seconds=0.3)
        with Connection(access) as line, pytest.raises(Broken):
            line.ask(Request("OPTIONS"))


@pytest.mark.parametrize("chunk", [b" ", b"1\r\n \r\n"], ids=["blanks", "chunks"])
def test_blanks_before_extents_say_that_the_server_is_at_work(chunk: bytes):
    said = b'[{"start":0,"length":4096,"zero":true}]'
    if chunk == b" ":
        head, rest = b"Content-Length: %d" % (len(said) + 30), said
    else:
        head, rest = b"Transfer-Encoding: chunked", b"%x\r\n%b\r\n0\r\n\r\n" % (len(said), said)
    serve = says(b"HTTP/1.1 200 X\r\n%b\r\n\r\n" % head, *[chunk] * 30, rest, pause=0.02)
    with port(serve) as number, contextlib.closing(remote(number)) as image:
        assert list(image.extents()) == [(0, 4096, True, False)]


class Clock:
    """Time that passes when it is told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_rate_is_a_mean_over_times_as_long_as_the_timeout():
    clock = Clock()
    pace = Pace(60, clock)
    pace.came(b"x")
    clock.now = 59  # long silence, then much: no drip
    pace.came(b"x")
    clock.now = 61
    pace.came(b"x" * 61 * LEAST_RATE)
    clock.now = 120
    pace.came(b"x" * LEAST_RATE)
    clock.now = 122
    with pytest.raises(Slow):
        pace.came(b"x")


def test_a_server_at_work_has_an_hour():
    clock = Clock()
    pace = Pace(60, clock)
    pace.blanks_seconds = 3600.0
    for clock.now in range(0, 3600, 59):
        pace.came(b" ")
    clock.now = 3598
    pace.came(b"[" * 64)
    for clock.now in (3600, 3640):
        pace.came(b" ")
    clock.now = 3659
    with pytest.raises(Slow):
        pace.came(b" ")


@pytest.mark.parametrize(("count", "goes_on"), [(1, False), (LEAST_RATE, True)])
def test_patience_ends_where_each_connection_brings_a_byte(count: int, goes_on: bool):
    clock, size, left = Clock(), 400 * LEAST_RATE, [400]
    budget = RetryBudget(10, clock, lambda: 0.0)

    def move(piece: Piece, advance: Callable[[int], None]) -> None:
        clock.now += 1
        left[0] -= 1
        if piece.position < size and left[0]:
            piece.position += count
            advance(count)
            raise Broken("cut")

    movers = Movers(move, [Piece(0, 0, size)], budget, is_proof=True)
    movers._stop.wait = lambda _timeout=None: False  # type: ignore[method-assign]
    with contextlib.nullcontext() if goes_on else pytest.raises(Transient):
        movers.run(1, lambda: None, lambda: None)
    assert (left[0] == 0) == goes_on


# What says nothing of what was asked


def put(image: Remote) -> object:
    return image.put(4, [b"data"], flush=True)


ACTIONS = {
    "PUT": put,
    "PUT of a part": lambda image: image.write(0, 4, [b"data"]),
    "zero": lambda image: image.zero(0, 4),
    "flush": Remote.flush,
}


def takes(*texts: bytes) -> Serve:
    """Read head and body, then answer."""

    def serve(connection: socket.socket) -> None:
        said = b""
        while b"\r\n\r\n" not in said or not said.endswith((b"data", b"}")):
            said += connection.recv(65536)
        for text in texts:
            connection.sendall(text)

    return serve


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize(
    "body",
    [b"", b"<html>ok</html>", b"[]", b"{}", b'{"ok":false,"error":"no"}', b'{"ok":1}'],
    ids=repr,
)
def test_what_is_not_said_to_be_done_is_not(action: str, body: bytes):
    found = failure(takes(answer(body)), ACTIONS[action], seconds=5)
    method = action.partition(" ")[0].replace("zero", "PATCH").replace("flush", "PATCH")
    method = "POST" if action == "flush of a file" else method
    assert type(found) is Failed
    why = ": no" * (b"error" in body)
    assert str(found).endswith(
        f" answered {method} with 200, but does not say that it is done{why}"
    )


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize(
    "text", [answer(b'{"ok":true}'), answer(b"", "Server: imageio/2.5.1")], ids=["ours", "oVirt's"]
)
def test_what_is_said_to_be_done_is(action: str, text: bytes):
    with port(takes(text)) as number, contextlib.closing(remote(number, seconds=5)) as image:
        assert ACTIONS[action](image) in {None, True}  # for a PUT: the image was flushed


def test_nothing_is_no_answer_to_options():
    found = failure(says(answer(b"")), Remote.abilities)
    assert str(found) == "OPTIONS was answered with nothing: this is no image server"


def test_a_url_with_a_zone_is_asked():
    asked = []

    def serve(connection: socket.socket) -> None:
        asked.append(connection.recv(65536))
        connection.sendall(answer(b'{"features":[]}'))

    with port(serve, "::1") as number:
        access = Access(f"http://[::1%25{socket.if_nametoindex('lo')}]:{number}/images/x")
        with contextlib.closing(Remote(access, 1)) as image:
            image.abilities()
        with Connection(access) as line:
            line.ask(Request("OPTIONS"))
    assert [f"Host: [::1]:{number}\r\n".encode() in text for text in asked] == [True, True]
