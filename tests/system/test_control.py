# SPDX-License-Identifier: Apache-2.0
"""The control socket (docs/api.md), over three workers."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.system.clients import putting, reading
from tests.system.controlling import Control, ask_raw
from tests.system.harness import ROOT, Server, exchange, nbdkit, qemu_nbd, wait_until
from tests.system.skips import needs

SIZE = 64 << 20
UNKNOWN = (404, "unknown image_id")


@pytest.fixture(scope="module")
def server(workplace: Path) -> Iterator[Server]:
    (workplace / "one").write_bytes(b"one")
    (workplace / "two").write_bytes(b"two")
    with Server(workplace, control_socket=workplace / "control", client_timeout=3) as running:
        yield running


@pytest.fixture
def control(server: Server) -> Control:
    return Control(server.directory / "control")


@pytest.fixture(scope="module")
def big(workplace: Path) -> Iterator[dict[str, str]]:
    """An image larger than all buffers on the way."""
    path = workplace / "big"
    with path.open("wb") as file:
        file.truncate(SIZE)
    with qemu_nbd(path) as sock:
        yield {"socket": str(sock)}


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """An id of this test's own."""
    return request.node.name.removeprefix("test_")[:60]


def file_of(server: Server, name: str) -> dict[str, str]:
    return {"backend": "file", "file": str(server.directory / name)}


@contextlib.contextmanager
def one_of_each(server: Server) -> Iterator[list[http.client.HTTPConnection]]:
    """Open connections until every worker has accepted one."""
    with contextlib.ExitStack() as stack:
        found: dict[int, http.client.HTTPConnection] = {}

        def connect() -> bool:
            connection = stack.enter_context(contextlib.closing(server.connect()))
            connection.connect()
            found.setdefault(server.worker_of(connection.sock), connection)
            return len(found) == server.workers

        wait_until(connect, 30)
        yield list(found.values())


# Register, unregister, status


def test_a_registered_transfer_is_served_until_it_is_unregistered(server, control, name):
    before = control.status()["active_transfers"]
    assert server.request("GET", f"/images/{name}").refusal == UNKNOWN
    registered = control.register(name, **file_of(server, "one"))
    assert registered == {"status": "ok", "active_transfers": before + 1}
    assert server.request("GET", f"/images/{name}").body == b"one"
    assert control.status() == registered
    assert control.unregister(name) == {"status": "ok", "active_transfers": before}
    assert server.request("GET", f"/images/{name}").refusal == UNKNOWN
    assert control.unregister(name) == {"status": "ok", "active_transfers": before}


def test_every_worker_sees_each_change_in_its_next_request(server, control, name):
    path = f"/images/{name}"
    with one_of_each(server) as connections:
        for _ in range(5):
            for content in ("one", "two"):
                control.register(name, **file_of(server, content))
                bodies = [exchange(each, "GET", path).body for each in connections]
                assert bodies == [content.encode()] * 3
            control.unregister(name)
            assert [exchange(each, "GET", path).refusal for each in connections] == [UNKNOWN] * 3


def test_a_registration_that_has_settled_and_may_be_cached_is_replaced_as_well(
    server, control, name
):
    path = f"/images/{name}"
    control.register(name, **file_of(server, "one"))
    time.sleep(2.2)  # files younger than 2 s are not cached
    with one_of_each(server) as connections:
        for content in (b"one", b"one"):
            assert [exchange(each, "GET", path).body for each in connections] == [content] * 3
        control.register(name, **file_of(server, "two"))
        assert [exchange(each, "GET", path).body for each in connections] == [b"two"] * 3
    control.unregister(name)


def test_ten_threads_register_and_unregister_two_hundred_transfers(server, control):
    before = control.status()["active_transfers"]
    names = [f"many-{number}" for number in range(200)]
    with ThreadPoolExecutor(10) as threads:
        answers = list(threads.map(lambda n: control.register(n, **file_of(server, "one")), names))
        assert {answer["status"] for answer in answers} == {"ok"}
        assert max(answer["active_transfers"] for answer in answers) == before + 200
        assert control.status()["active_transfers"] == before + 200
        got = threads.map(lambda n: server.request("GET", f"/images/{n}").body, names)
        assert list(got) == [b"one"] * 200
        answers = list(threads.map(control.unregister, names))
        assert {answer["status"] for answer in answers} == {"ok"}
        gone = threads.map(lambda n: server.request("GET", f"/images/{n}").status, names)
        assert list(gone) == [404] * 200
    assert control.status()["active_transfers"] == before


def test_ten_threads_fight_over_one_id_and_the_last_word_counts(server, control, name):
    def fight(content: str) -> None:
        for _ in range(10):
            assert control.register(name, **file_of(server, content))["status"] == "ok"
            assert control.unregister(name)["status"] == "ok"

    with ThreadPoolExecutor(10) as threads:
        list(threads.map(fight, ["one", "two"] * 5))
    assert server.request("GET", f"/images/{name}").refusal == UNKNOWN
    control.register(name, **file_of(server, "two"))
    assert server.request("GET", f"/images/{name}").body == b"two"
    control.unregister(name)


def test_what_is_registered_need_not_exist_yet(server, control, name):
    late = server.directory / "late"
    assert control.register(name, backend="file", file=str(late))["status"] == "ok"
    assert server.request("GET", f"/images/{name}").refusal == (500, "failed to access file")
    late.write_bytes(b"late")
    assert server.request("GET", f"/images/{name}").body == b"late"
    control.unregister(name)
    socket_ = {"socket": str(server.directory / "late.sock")}
    assert control.register(name, **socket_)["status"] == "ok"
    assert server.request("GET", f"/images/{name}").refusal == (500, "backend error")
    control.unregister(name)


def test_a_registration_wins_over_a_file_and_leaves_it_alone(server, control, name):
    path = server.add(name, **file_of(server, "one"))
    assert server.request("GET", path).body == b"one"
    control.register(name, **file_of(server, "two"))
    assert server.request("GET", path).body == b"two"
    assert control.unregister(name)["status"] == "ok"
    assert server.request("GET", path).body == b"one"
    assert (server.config / name).exists()


def test_a_read_only_registration_is(server, control, name):
    control.register(name, **file_of(server, "one"), read_only=True)
    assert server.request("PUT", f"/images/{name}", b"x").status == 405
    assert (server.directory / "one").read_bytes() == b"one"
    control.unregister(name)


@pytest.mark.parametrize("odd", ["a\nb", ".hidden", "\u00fc", "x" * 255, "new-1", "a b"])
def test_any_id_may_be_registered(server, control, odd):
    control.register(odd, **file_of(server, "one"))
    quoted = "".join(f"%{byte:02x}" for byte in odd.encode())
    assert server.request("GET", f"/images/{quoted}").body == b"one"
    control.unregister(odd)


def test_status_of_one_tells_what_was_done_through_all_workers(server, control, big, name):
    control.register(name, **big)
    expected = {"requests_in_flight": 0, "bytes_read": 0, "bytes_written": 0, "last_error": None}
    assert control.status(name).items() >= expected.items()
    with one_of_each(server) as connections:
        for connection in connections:
            part = {"Range": "bytes=100-1099"}
            assert exchange(connection, "GET", f"/images/{name}", headers=part).status == 206
            expected["bytes_read"] += 1000
            assert control.status(name).items() >= expected.items()
            body = b"\0" * 500
            part = {"Range": "bytes=0-499", "Content-Type": "application/octet-stream"}
            assert exchange(connection, "PATCH", f"/images/{name}", body, part).status == 200
            expected["bytes_written"] += 500
            assert control.status(name).items() >= expected.items()
    assert 0 <= control.status(name)["idle_seconds"] < 5
    control.unregister(name)
    assert control.status(name) == {"status": "error", "message": "unknown transfer_id"}


def test_status_of_one_tells_what_is_going_on(server, control, big, name):
    control.register(name, **big)
    url = f"/images/{name}"
    with reading(server, url), putting(server, url, SIZE, bytes(8 << 20)) as (sock, _):
        wait_until(lambda: control.status(name)["requests_in_flight"] == 2)
        wait_until(lambda: control.status(name)["bytes_read"] > 0)
        sock.sendall(bytes(1 << 20))  # what is acknowledged is noted when more has come
        wait_until(lambda: control.status(name)["bytes_written"] > 0)
        assert control.status(name)["idle_seconds"] == 0
    wait_until(lambda: control.status(name)["requests_in_flight"] == 0)
    assert control.status(name)["last_error"].startswith(("ClientGone", "ShortBody"))
    control.unregister(name)


def test_status_of_one_tells_the_last_error(server, control, name):
    control.register(name, socket=str(server.directory / "none.sock"))
    assert server.request("GET", f"/images/{name}").status == 500
    assert "none.sock" in control.status(name)["last_error"]
    control.unregister(name)


def test_status_of_a_file_that_nobody_keeps_track_of_says_that_it_is_not_known(
    server, control, name
):
    server.add(name, **file_of(server, "one"))
    found = control.status(name)
    assert found.pop("active_transfers") >= 0
    names = ("bytes_read", "bytes_written", "idle_seconds", "last_error", "requests_in_flight")
    assert found == {"status": "ok"} | dict.fromkeys(names)


# The protocol


def test_the_socket_is_for_owner_and_group(control):
    assert control.path.stat().st_mode & 0o777 == 0o660


@pytest.mark.parametrize("ends", [False, True], ids=["newline", "end"])
def test_a_request_ends_with_a_newline_or_with_the_input(control, ends):
    request = b'{"action":"status"}' + (b"" if ends else b"\n")
    assert json.loads(ask_raw(control.path, request, ends=ends))["status"] == "ok"


def test_a_request_may_arrive_byte_by_byte_and_what_follows_is_ignored(control):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(control.path))
        for byte in b'{"action":"status"}\n':
            sock.sendall(bytes([byte]))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(b'{"action":"other"}\n')
        answer = sock.makefile("rb").read()
    assert (json.loads(answer)["status"], answer.count(b"\n")) == ("ok", 1)


MALFORMED = {
    "nothing": (b"", "invalid JSON: "),
    "empty line": (b"\n", "invalid JSON: "),
    "no json": (b"status\n", "invalid JSON: "),
    "cut off": (b'{"action":"sta', "invalid JSON: "),
    "two": (b'{"action":"status"}{"action":"status"}\n', "invalid JSON: "),
    "not utf-8": (b'{"action":"\xff"}\n', "invalid JSON: "),
    "binary": (bytes(range(256)), "invalid JSON: "),
    "deep": (b"[" * 100_000 + b"\n", "invalid JSON: "),
    "list": (b"[]\n", "request must be a JSON object"),
    "text": (b'"status"\n', "request must be a JSON object"),
    "no action": (b"{}\n", "missing action"),
    "unknown action": (b'{"action":"restart"}\n', "unknown action: restart"),
    "action of a wrong type": (b'{"action":["status"]}\n', "unknown action: "),
    "no id, no config": (b'{"action":"register"}\n', "missing transfer_id or config"),
    "no id": (b'{"action":"unregister"}\n', "missing transfer_id"),
    "path": (
        b'{"action":"register","transfer_id":"../x","config":{"file":"/x"}}\n',
        "invalid transfer_id",
    ),
    "server": (b'{"action":"unregister","transfer_id":"*"}\n', "invalid transfer_id"),
    "backend": (
        b'{"action":"register","transfer_id":"x","config":{"backend":"rbd"}}\n',
        "unsupported backend: rbd",
    ),
    "config": (
        b'{"action":"register","transfer_id":"x","config":{"backend":"file"}}\n',
        'invalid config: missing "file"',
    ),
    "http": (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "invalid JSON: "),
    "too large": (b'{"action":"' + b"x" * (128 << 10) + b'"}\n', "request is larger than"),
    "endless": (b"x" * (4 << 20), "request is larger than"),
    "file too long": (
        b'{"action":"register","transfer_id":"x","config":{"backend":"file","file":"/%s"}}\n'
        % (b"x" * (66 << 10)),
        "invalid config: larger than 65536 bytes",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_input_is_told_so_and_changes_nothing(control, name):
    request, message = MALFORMED[name]
    before = control.status()
    answer = ask_raw(control.path, request, ends=True)
    told = json.loads(answer)
    assert answer.count(b"\n") == 1
    assert (told["status"], set(told)) == ("error", {"status", "message"})
    assert told["message"].startswith(message)
    assert control.status() == before


def test_a_silent_peer_is_cut_off_and_delays_nobody(server, control):
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(30)]
        for sock in silent:
            sock.settimeout(30)
            sock.connect(str(control.path))
        assert control.status()["status"] == "ok"
        assert time.monotonic() - began < 2
        for sock in silent:
            assert b"request took too long" in sock.makefile("rb").read()
    assert time.monotonic() - began < 6  # the client timeout is 3 s


def test_it_answers_while_every_transfer_thread_is_busy(workplace, big):
    home = Path(tempfile.mkdtemp(dir=workplace))
    with Server(home, workers=1, threads=2, control_socket=home / "c") as server:
        control = Control(home / "c")
        control.register("busy", **big)
        with reading(server, "/images/busy"), reading(server, "/images/busy"):
            assert server.request("GET", "/images/busy").refusal == (503, "server busy")
            assert control.status("busy")["requests_in_flight"] == 2


PEER = """
import socket, sys
sock = socket.socket(socket.AF_UNIX)
try:
    sock.connect(sys.argv[1])
except PermissionError:
    sys.exit("no permission")
sock.sendall(b'{"action":"status"}\\n')
print(sock.makefile().read())
"""


def as_nobody(path: Path) -> subprocess.CompletedProcess[str]:
    command = ["/usr/bin/python3", "-c", PEER, str(path)]
    return subprocess.run(
        command, user=65534, group=65534, extra_groups=[], capture_output=True, text=True,
        cwd="/", timeout=30, check=False,
    )  # fmt: skip


@needs("owners")
def test_a_peer_without_rights_is_refused_by_mode_and_by_name(workplace):
    home = Path(tempfile.mkdtemp(dir=workplace))
    with Server(home, control_socket=home / "c") as server:
        control = Control(home / "c")
        for directory in (workplace, home):
            directory.chmod(0o711)
        try:
            assert as_nobody(control.path).stderr.strip() == "no permission"
            control.path.chmod(0o666)
            answer = json.loads(as_nobody(control.path).stdout)
        finally:
            workplace.chmod(0o700)
        assert answer == {"status": "error", "message": "permission denied"}
        assert "refused: uid=65534" in server.log
        assert control.status()["status"] == "ok"


# Unregistering what is in use


@contextlib.contextmanager
def asked(what: Callable[[], object]) -> Iterator[list[object]]:
    """Ask on a thread; the list gets the answer when it comes."""
    answers: list[object] = []
    thread = threading.Thread(target=lambda: answers.append(what()))
    thread.start()
    yield answers
    thread.join(30)
    assert not thread.is_alive()


def test_unregister_waits_for_the_request_in_flight(server, control, big, name):
    control.register(name, **big)
    with putting(server, f"/images/{name}", SIZE, bytes(1 << 20)) as (sock, stream):
        with asked(lambda: control.unregister(name)) as answers:
            wait_until(lambda: server.request("GET", f"/images/{name}").status == 404)
            time.sleep(0.3)
            assert answers == []
            sock.sendall(bytes(SIZE - (1 << 20)))
            assert stream.readline().startswith(b"HTTP/1.1 200 ")
            wait_until(lambda: answers)
        assert answers[0]["status"] == "ok"


def test_unregister_that_waits_does_not_hear_of_new_requests(server, control, big, name):
    control.register(name, **big)
    url = f"/images/{name}"
    with reading(server, url) as sock, asked(lambda: control.unregister(name)) as answers:
        wait_until(lambda: server.request("GET", url).status == 404)
        for _ in range(50):
            assert server.request("OPTIONS", url).status == 404
        assert answers == []
        sock.close()


def test_unregister_says_busy_when_its_time_is_up_and_may_be_asked_again(
    server, control, big, name
):
    control.register(name, **big)
    with reading(server, f"/images/{name}") as sock:
        began = time.monotonic()
        busy = {"status": "error", "message": "busy"}
        assert control.unregister(name, timeout=0.5) == busy
        assert 0.5 <= time.monotonic() - began < 2
        assert server.request("GET", f"/images/{name}").refusal == UNKNOWN
        assert control.unregister(name, timeout=0) == busy
        sock.close()
        assert control.unregister(name, timeout=10)["status"] == "ok"


@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_force_cuts_what_waits_for_its_client_within_a_second(server, control, big, name, method):
    control.register(name, **big)
    url = f"/images/{name}"
    before = server.holders()
    begun = reading(server, url) if method == "GET" else putting(server, url, SIZE, bytes(1 << 20))
    with begun as running:
        sock = running if method == "GET" else running[0]
        began = time.monotonic()
        assert control.unregister(name, force=True)["status"] == "ok"
        assert time.monotonic() - began < 1
        assert server.holders() == before
        with contextlib.suppress(ConnectionResetError):
            while sock.recv(1 << 20):
                pass
    control.register(name, **big)
    assert server.request("PUT", url, bytes(SIZE)).status == 200
    control.unregister(name)


@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_force_cuts_what_waits_for_its_back_end_within_a_second(
    server, control, workplace, name, method
):
    slow = ("--filter=delay", "memory", "1M", "delay-read=20", "delay-write=20", "delay-close=0")
    with nbdkit(workplace / f"slow-{method}.sock", *slow) as sock:
        control.register(name, socket=str(sock))
        body = bytes(1 << 20) if method == "PUT" else None

        def request() -> object:
            with contextlib.suppress(OSError, http.client.HTTPException):
                return server.request(method, f"/images/{name}", body).status
            return "cut"

        with asked(request) as answers:
            wait_until(lambda: control.status(name)["requests_in_flight"] == 1)
            time.sleep(0.3)
            began = time.monotonic()
            assert control.unregister(name, force=True)["status"] == "ok"
            assert time.monotonic() - began < 1.2
            wait_until(lambda: answers, 2)
        assert answers in ([500], ["cut"])


def test_force_cuts_what_waits_for_a_handshake_within_a_second(server, control, workplace, name):
    path = workplace / f"{name}.mute"
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(str(path))
        mute.listen()
        control.register(name, socket=str(path))
        with server.raw(f"GET /images/{name} HTTP/1.1\r\nHost: x\r\n\r\n".encode()):
            wait_until(lambda: control.status(name)["requests_in_flight"] == 1)
            began = time.monotonic()
            assert control.unregister(name, force=True)["status"] == "ok"
            assert time.monotonic() - began < 1


def test_force_cuts_a_client_that_dawdles_over_a_small_body(server, control, big, name):
    control.register(name, **big)
    head = (
        f"PATCH /images/{name} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        "Content-Length: 100\r\n\r\n{"
    )
    with server.raw(head.encode()) as sock:
        wait_until(lambda: control.status(name)["requests_in_flight"] == 1)
        began = time.monotonic()
        assert control.unregister(name, force=True)["status"] == "ok"
        assert time.monotonic() - began < 1
        with contextlib.suppress(ConnectionResetError):
            while sock.recv(1000):  # answered or not: it is over
                pass


def test_force_leaves_other_transfers_and_later_requests_alone(server, control, big, name):
    control.register(name, **big)
    control.register(f"{name}-other", **big)
    with reading(server, f"/images/{name}-other") as other:
        with reading(server, f"/images/{name}"):
            assert control.unregister(name, force=True)["status"] == "ok"
        control.register(name, **big)
        with reading(server, f"/images/{name}") as later:
            for sock in (other, later):
                left = SIZE
                while left and (data := sock.recv(1 << 20)):
                    left -= len(data)
                assert left == 0
    control.unregister(name)
    control.unregister(f"{name}-other")


def test_a_peer_that_hangs_up_is_not_waited_for(server, control, big, name):
    control.register(name, **big)
    with reading(server, f"/images/{name}"):
        for _ in range(40):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(str(control.path))
                sock.sendall(
                    json.dumps({"action": "unregister", "transfer_id": name}).encode() + b"\n"
                )
        time.sleep(0.2)
        assert control.status()["status"] == "ok"
    assert control.unregister(name)["status"] == "ok"


# What dies


@pytest.fixture
def own(workplace: Path) -> Iterator[Server]:
    """A server that may be mistreated."""
    home = Path(tempfile.mkdtemp(dir=workplace))
    (home / "one").write_bytes(b"one")
    with Server(home, control_socket=home / "control") as running:
        yield running


def test_registrations_and_accounts_survive_workers_that_are_killed(own, big):
    control = Control(own.directory / "control")
    control.register("x", **file_of(own, "one"))
    control.register("big", **big)
    assert own.request("GET", "/images/x").body == b"one"
    with reading(own, "/images/big"):
        wait_until(lambda: control.status("big")["bytes_read"] > 0)
        time.sleep(0.5)
        so_far = control.status("big")["bytes_read"]
        old = own.worker_pids()
        for pid in old:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: len(set(own.worker_pids()) - set(old)) == 3)
        found = control.status("big")
        assert (found["requests_in_flight"], found["bytes_read"]) == (0, so_far)
    assert control.status("x")["bytes_read"] == 3
    assert own.request("GET", "/images/x").body == b"one"
    assert control.unregister("big", timeout=1)["status"] == "ok"


def test_it_answers_throughout_a_reload(own, big):
    control = Control(own.directory / "control")
    control.register("x", **file_of(own, "one"))
    control.register("big", **big)
    old = own.worker_pids()
    with (
        reading(own, "/images/big") as sock,
        asked(lambda: control.unregister("big")) as answers,
    ):
        wait_until(lambda: own.request("OPTIONS", "/images/big").status == 404)
        own.process.send_signal(signal.SIGHUP)
        until = time.monotonic() + 3
        while time.monotonic() < until:
            assert control.status("x")["status"] == "ok"
            assert control.register("y", **file_of(own, "one"))["status"] == "ok"
        wait_until(lambda: set(own.worker_pids()) - set(old))
        assert answers == []
        sock.close()
        wait_until(lambda: answers and answers[0]["status"] == "ok", 20)
    assert own.request("GET", "/images/x").body == b"one"


def test_registrations_survive_a_restart(own):
    control = Control(own.directory / "control")
    for number in range(5):
        control.register(f"x{number}", **file_of(own, "one"))
    control.unregister("x0")
    own.stop()
    assert not control.path.exists()
    own.start()
    assert control.status()["active_transfers"] == 4
    assert own.request("GET", "/images/x4").body == b"one"
    assert own.request("GET", "/images/x0").refusal == UNKNOWN
    assert control.path.stat().st_mode & 0o777 == 0o660


def test_a_new_server_takes_over_from_one_whose_master_was_killed(own, big):
    control = Control(own.directory / "control")
    control.register("big", **big)
    with reading(own, "/images/big"):
        orphans = own.worker_pids()
        own.process.kill()
        own.process.wait()
        own.start()
        try:
            found = control.status("big")
            assert (found["active_transfers"], found["requests_in_flight"]) == (1, 1)
            assert control.unregister("big", force=True)["status"] == "ok"
        finally:
            for pid in orphans:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def test_an_upgrade_hands_the_socket_over(own):
    control = Control(own.directory / "control")
    control.register("x", **file_of(own, "one"))
    assert own.process is not None
    workers = own.worker_pids()
    own.process.send_signal(signal.SIGUSR2)
    (new,) = wait_until(lambda: set(own.worker_pids()) - set(workers))
    try:
        wait_until(lambda: own.log.count(" accepts connections") == 6, 20)
        assert control.status("x")["status"] == "ok"
        own.process.terminate()
        own.process.wait(20)
        for _ in range(10):
            assert control.status("x")["status"] == "ok"
        assert control.path.stat().st_mode & 0o777 == 0o660
    finally:
        os.kill(new, signal.SIGTERM)
        wait_until(lambda: not Path(f"/proc/{new}").exists() or _is_zombie(new), 20)


def _is_zombie(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


def test_a_second_server_is_refused_while_the_first_one_listens(own):
    home = Path(tempfile.mkdtemp(dir=own.directory))
    second = Server(home, control_socket=own.directory / "control")
    done = subprocess.run(
        second.command, cwd=ROOT, env=second.env, capture_output=True, text=True, timeout=30,
        check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "another server listens" in done.stderr
    assert Control(own.directory / "control").status()["status"] == "ok"


def test_without_the_setting_nothing_is_registered(workplace):
    home = Path(tempfile.mkdtemp(dir=workplace))
    (home / "one").write_bytes(b"one")
    with Server(home, control_socket=home / "control") as server:
        Control(home / "control").register("x", **file_of(server, "one"))
        server.stop()
        del server.env["IMAGESERVER_CONTROL_SOCKET"]
        server.start()
        assert server.request("GET", "/images/x").refusal == UNKNOWN
        assert not (home / "control").exists()
