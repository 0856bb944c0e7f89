# SPDX-License-Identifier: Apache-2.0
"""The admin listener: who may ask, what is told, and that nothing stands in its way."""

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.clients import putting, reading
from tests.system.harness import ROOT, Server, free_port, qemu_nbd, wait_until
from tests.system.pki import TlsServer, make_pki
from tests.system.skips import needs
from tests.system.watching import Admin, short

SIZE = 64 << 20  # more than the socket buffers of a connection hold
PATHS = ("/healthz", "/readyz", "/status", "/metrics")


@pytest.fixture(scope="module")
def big(workplace: Path) -> Iterator[dict[str, str]]:
    path = workplace / "big"
    with path.open("wb") as file:
        file.truncate(SIZE)
    with qemu_nbd(path, export="e") as sock:
        yield {"socket": str(sock), "export": "e"}


@pytest.fixture(scope="module")
def tcp() -> Admin:
    return Admin(free_port())


@pytest.fixture(scope="module")
def unix(workplace: Path) -> Admin:
    return Admin(workplace / "admin")


@pytest.fixture(scope="module")
def server(workplace: Path, tcp: Admin, unix: Admin, big: dict[str, str]) -> Iterator[Server]:
    with Server(workplace, admin_bind=f"{tcp.bind},{unix.bind}", max_writers=2) as running:
        running.add("big", **big)
        running.add("file", backend="file", file=str(workplace / "file"))
        yield running


@pytest.fixture(params=["tcp", "unix"])
def admin(request: pytest.FixtureRequest, server: Server) -> Admin:
    found: Admin = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def home(workplace: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=workplace))


# What is answered, and to whom


@pytest.mark.parametrize("path", PATHS)
def test_get_and_head_are_answered_alike(admin, path):
    got, asked = admin.ask(path), admin.ask(path, "HEAD")
    assert (got.status, asked.status, asked.body) == (200, 200, b"")
    assert got.headers["Cache-Control"] == "no-store"
    assert got.headers["Access-Control-Allow-Origin"] is None
    assert int(got.headers["Content-Length"]) == len(got.body)
    assert asked.headers["Content-Type"] == got.headers["Content-Type"]


def test_a_server_that_is_well_says_so(admin):
    assert admin.ask("/healthz").body == b'{"status":"ok"}'
    assert admin.ask("/readyz").body == b'{"status":"ready","failed":[]}'


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", "/", 404, "not found"),
        ("GET", "/images/big", 404, "not found"),
        ("OPTIONS", "/images/*", 404, "not found"),
        ("GET", "/status/", 404, "not found"),
        ("PUT", "/images/big", 404, "not found"),
        ("POST", "/readyz", 405, "method not allowed"),
        ("OPTIONS", "/status", 405, "method not allowed"),
        ("DELETE", "/metrics", 405, "method not allowed"),
        ("BREW", "/healthz", 405, "method not allowed"),
    ],
)
def test_anything_else_is_refused(admin, method, path, status, message):
    answer = admin.ask(path, method)
    assert (answer.status, answer.json) == (status, {"error": message})
    assert answer.headers["Allow"] == ("GET, HEAD" if status == 405 else None)


@pytest.mark.parametrize("path", PATHS)
def test_the_clients_of_images_find_none_of_it(server, path):
    assert server.request("GET", path).refusal == (404, "not found")


PEER = """
import socket, sys
sock = socket.socket(socket.AF_UNIX)
try:
    sock.connect(sys.argv[1])
except PermissionError:
    sys.exit("no permission")
try:
    sock.sendall(b"GET /status HTTP/1.0\\r\\n\\r\\n")
    print(sock.makefile().read())
except (BrokenPipeError, ConnectionResetError):
    pass
"""


def as_nobody(path: Path) -> subprocess.CompletedProcess[str]:
    command = ["/usr/bin/python3", "-c", PEER, str(path)]
    return subprocess.run(
        command, user=65534, group=65534, extra_groups=[], capture_output=True, text=True,
        cwd="/", timeout=30, check=False,
    )  # fmt: skip


def test_the_socket_is_for_the_servers_user(server, unix):
    assert unix.place.stat().st_mode & 0o777 == 0o600


@needs("owners")
def test_others_are_kept_out_by_mode_and_by_name(server, unix, workplace):
    workplace.chmod(0o711)
    try:
        assert as_nobody(unix.place).stderr.strip() == "no permission"
        unix.place.chmod(0o666)  # as it is for a moment after it was bound
        done = as_nobody(unix.place)
    finally:
        unix.place.chmod(0o600)
        workplace.chmod(0o700)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


# /status


def rows(admin: Admin, operation: str) -> list[Any]:
    return [row for row in admin.transfers() if row["operation"] == operation]


def test_every_running_transfer_of_every_worker_is_told_as_it_advances(server, admin):
    name = short if repr(admin) == "tcp" else str
    with contextlib.ExitStack() as stack:
        pids = set()

        def read() -> bool:  # until two workers have one
            sock = stack.enter_context(reading(server, "/images/big"))
            pids.add(server.worker_of(sock))
            return len(pids) > 1

        wait_until(read)
        sock, _ = stack.enter_context(putting(server, "/images/file", SIZE, bytes(4 << 20)))
        (put,) = wait_until(lambda: rows(admin, "replace"))
        assert set(put) == {
            *("id", "operation", "client", "worker"),
            *("done", "expected", "rate", "age"),
        }
        assert (put["id"], put["client"]) == (name("file"), "127.0.0.1")
        reads = rows(admin, "read")
        assert {row["id"] for row in reads} == {name("big")}
        assert {row["worker"] for row in reads} == pids
        assert {row["worker"]: row["busy"] for row in admin.status()["workers"]}.keys() >= pids

        seen = [put["done"]]
        for _ in range(3):
            sock.sendall(bytes(8 << 20))
            seen.append(wait_until(lambda: advanced(admin, seen[-1]))["done"])
        (put,) = rows(admin, "replace")
        assert put["expected"] == SIZE
        assert 0 < put["age"] < 60
        ages = put["age"] + 0.001, max(put["age"] - 0.001, 0.0001)  # of a rounded number
        least, most = (put["done"] / age for age in ages)
        assert least - 1 <= put["rate"] <= most + 1
    wait_until(lambda: admin.transfers() == [])


def advanced(admin: Admin, done: int) -> Any:
    (row,) = rows(admin, "replace")
    return row if row["done"] > done else None


def test_the_oldest_comes_first(server, admin):
    with reading(server, "/images/big"), putting(server, "/images/file", SIZE):
        ages = [row["age"] for row in wait_until(lambda: [*admin.transfers()])]
        wait_until(lambda: len(admin.transfers()) == 2)
        ages = [row["age"] for row in admin.transfers()]
        assert ages == sorted(ages, reverse=True)
    wait_until(lambda: admin.transfers() == [])


def test_every_worker_is_told_with_its_state(server, admin):
    wait_until(lambda: all(row["state"] == "accepting" for row in admin.status()["workers"]))
    assert [row["worker"] for row in admin.status()["workers"]] == sorted(server.worker_pids())


def test_what_a_dead_worker_ran_is_gone(server, unix):
    with contextlib.suppress(OSError), reading(server, "/images/big") as sock:
        dead = server.worker_of(sock)
        wait_until(unix.transfers)
        os.kill(dead, signal.SIGKILL)
        wait_until(lambda: unix.transfers() == [])
        wait_until(lambda: len(server.worker_pids()) == 3)
        wait_until(lambda: len(unix.status()["workers"]) == 3)
        assert dead not in {row["worker"] for row in unix.status()["workers"]}


# /readyz


def _remove_config(server: Server) -> Callable[[], object]:
    away = server.config.rename(server.config.with_name("away"))
    return lambda: away.rename(server.config)


def _distrust_config(server: Server) -> Callable[[], object]:
    server.config.chmod(0o777)
    return lambda: server.config.chmod(0o700)


def _remove_runtime(server: Server) -> Callable[[], object]:
    away = server.runtime.rename(server.runtime.with_name("gone"))
    return lambda: away.rename(server.runtime)


def _replace_table(server: Server) -> Callable[[], object]:
    table, away = server.runtime / "slots", server.runtime / "slots.away"
    table.rename(away)
    table.write_bytes(away.read_bytes())
    return lambda: away.rename(table)


@pytest.mark.parametrize(
    ("spoil", "failed"),
    [
        pytest.param(
            _remove_config,
            {"config_dir": "config cannot be used: No such file or directory"},
            id="config-removed",
        ),
        pytest.param(
            _distrust_config,
            {"config_dir": "config can be written by group or others (mode 0777)"},
            id="config-open-to-others",
        ),
        pytest.param(
            _remove_runtime,
            {
                "runtime_dir": "run: No such file or directory",
                "slot_table": "run is another, or gone",
            },
            id="runtime-removed",
        ),
        pytest.param(
            _replace_table, {"slot_table": "run is another, or gone"}, id="table-replaced"
        ),
    ],
)
def test_a_server_that_cannot_work_is_not_ready_until_it_can(server, admin, spoil, failed):
    repair = spoil(server)
    try:
        answer = admin.ask("/readyz")
        assert admin.ask("/healthz").status == 200
    finally:
        repair()
    problems = {found["check"]: found["problem"] for found in answer.json["failed"]}
    assert (answer.status, answer.json["status"]) == (503, "not ready")
    assert problems.keys() == failed.keys()
    assert [words for name, words in failed.items() if not problems[name].endswith(words)] == []
    assert admin.ask("/readyz").body == b'{"status":"ready","failed":[]}'


def test_a_table_that_was_cut_short_makes_a_server_unready(home):
    admin = Admin(free_port())
    with Server(home, workers=1, admin_bind=admin.bind) as server:
        table = server.runtime / "slots"
        os.truncate(table, table.stat().st_size - 1)  # less by a page would kill the worker
        answer = admin.ask("/readyz")
    problem = f"the file slots in {server.runtime} was cut short"
    assert (answer.status, answer.json["failed"]) == (
        503,
        [{"check": "slot_table", "problem": problem}],
    )


def test_a_damaged_header_makes_a_server_unready_until_a_worker_has_mended_it(server, unix):
    table = server.runtime / "slots"

    def damaged() -> Any:  # again and again, for each worker mends it every second
        with table.open("rb+") as file:
            file.write(b"\xff" * 8)
        answer = unix.ask("/readyz")
        return answer if answer.status == 503 else None

    assert wait_until(damaged).json["failed"] == [
        {"check": "slot_table", "problem": "its header is damaged"}
    ]
    wait_until(lambda: unix.ask("/readyz").status == 200)


def test_a_failure_of_our_own_is_logged_in_our_form_and_answered_in_json(home):
    admin = Admin(free_port())
    with Server(home, workers=1, admin_bind=admin.bind, log_format="json") as server:
        # Counts of a metric without a name: a file that reads well, and cannot be shown.
        key = b'["","x",{},""]'
        entry = struct.pack("=i", len(key)) + key + bytes(8 - (len(key) + 4) % 8) + bytes(16)
        made = struct.pack("=ii", 8 + len(entry), 0) + entry
        (server.runtime / "metrics" / "counter_77.db").write_bytes(made)
        answer = admin.ask("/metrics")
        assert (answer.status, answer.json) == (500, {"error": "internal error"})
        assert answer.headers["Content-Type"] == "application/json"
        assert admin.ask("/healthz").status == 200
        lines = [json.loads(line) for line in server.log.splitlines()]
    (told,) = [line for line in lines if line["level"] == "error"]
    assert told["message"] == "GET /metrics failed"
    assert "Traceback" in json.dumps(told)


# Whatever else goes on


def test_it_answers_while_every_thread_and_slot_is_taken(home, big):
    admin = Admin(free_port())
    with Server(home, workers=1, threads=2, max_readers=2, admin_bind=admin.bind) as server:
        server.add("big", **big)
        with reading(server, "/images/big"), reading(server, "/images/big"):
            assert server.request("GET", "/images/big").refusal == (503, "server busy")
            assert [admin.ask(path).status for path in PATHS] == [200] * 4
            assert [row["operation"] for row in admin.transfers()] == ["read", "read"]
            assert admin.status()["workers"][0]["busy"] == 2


def test_slow_clients_of_either_port_delay_nobody(home, big):
    admin = Admin(free_port())
    with (
        Server(home, workers=1, admin_bind=admin.bind) as server,
        contextlib.ExitStack() as stack,
    ):
        server.add("big", **big)
        head = b"GET /images/big HTTP/1.1\r\nX: "
        for _ in range(100):
            stack.enter_context(server.raw())
            stack.enter_context(server.raw(head))
        for index in range(20):
            sock = stack.enter_context(socket.socket())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            sock.connect(("127.0.0.1", admin.place))
            # Half a head, or an answer that nobody reads.
            sock.sendall(b"GET /metrics HTTP/1.1\r\nX: " + b"x\r\n\r\n" * (index % 2))
        for path in PATHS * 3:
            began = time.monotonic()
            assert admin.ask(path).status == 200
            assert time.monotonic() - began < 2
        assert server.request("OPTIONS", "/images/big").status == 200


def test_clients_that_ask_in_advance_and_take_no_answer_keep_nobody_out(home):
    admin = Admin(free_port())
    with Server(home, workers=1, admin_bind=admin.bind), contextlib.ExitStack() as stack:
        for _ in range(20):
            sock = stack.enter_context(socket.socket())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            sock.connect(("127.0.0.1", admin.place))
            sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 60)
        for path in PATHS * 3:
            began = time.monotonic()
            assert admin.ask(path).status == 200
            assert time.monotonic() - began < 2


def test_each_answer_ends_its_connection(server, tcp):
    with socket.create_connection(("127.0.0.1", tcp.place), 30) as sock:
        sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" * 2)
        answer = sock.makefile("rb").read()
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b"\r\nConnection: close\r\n" in answer


def test_a_head_that_is_wrong_is_refused_there_too(server, tcp):
    with socket.create_connection(("127.0.0.1", tcp.place), 30) as sock:
        sock.sendall(b"GET /status\r\n\r\n")
        answer = sock.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.endswith(b'{"error":"invalid request line"}')


def test_it_is_plain_where_images_are_served_over_tls(home):
    admin = Admin(free_port())
    with TlsServer(home, make_pki(home / "pki"), workers=1, admin_bind=admin.bind):
        assert admin.ask("/readyz").status == 200


# Starting, reloading, upgrading


def refused(server: Server) -> str:
    """Start a server that must refuse to; return its sentence."""
    done = subprocess.run(
        server.command, cwd=ROOT, env=server.env, capture_output=True, text=True, timeout=30,
        check=False,
    )  # fmt: skip
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line and "[INFO]" not in line]
    assert len(lines) == 1, lines
    return lines[0]


def test_an_address_that_is_taken_is_told_in_one_sentence(server, home, tcp):
    assert refused(Server(home, admin_bind=tcp.bind)) == (
        f"imageserver: IMAGESERVER_ADMIN_BIND: {tcp.bind} cannot be used (Address already in "
        "use); stop what listens there or choose another address."
    )


def test_a_socket_that_another_server_listens_at_is_told_in_one_sentence(server, home, unix):
    assert refused(Server(home, admin_bind=unix.bind)) == (
        f"imageserver: IMAGESERVER_ADMIN_BIND: another server listens at {unix.place}; "
        "stop it first."
    )
    assert unix.ask("/healthz").status == 200


def test_an_address_of_images_is_told_in_one_sentence(home):
    server = Server(home)
    server.env["IMAGESERVER_ADMIN_BIND"] = server.env["IMAGESERVER_BIND"]
    assert refused(server).startswith(
        f"imageserver: IMAGESERVER_ADMIN_BIND: {server.env['IMAGESERVER_BIND']} is an address of "
    )


def test_no_admin_listener_reads_back_from_show_config(home):
    server = Server(home, admin_bind="None")
    show = [sys.executable, "-m", "imageserver", "--show-config"]
    done = subprocess.run(
        show, cwd=ROOT, env=server.env, capture_output=True, text=True, check=True
    )
    assert "IMAGESERVER_ADMIN_BIND=none\n" in done.stdout


@pytest.fixture
def own(home: Path) -> Iterator[tuple[Server, list[Admin]]]:
    """A server of the test's own, with an address of each kind, and who asks at each."""
    admins = [Admin(free_port()), Admin(home / "admin")]
    name = f"imageserver-test-{os.getpid()}-{home.name}"
    bind = ",".join([*(admin.bind for admin in admins), f"unix:@{name}"])
    with Server(home, admin_bind=bind) as server:
        yield server, [*admins, Admin(Path("\0" + name))]


def test_a_reload_and_a_stop_lose_no_address(own, home):
    server, admins = own
    before = server.worker_pids()
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: not set(before) & set(server.worker_pids()), 20)
    for admin in admins:
        assert admin.ask("/readyz").status == 200
    assert server.stop() == 0
    assert not (home / "admin").exists()
    assert "Traceback" not in server.log


def test_a_successor_takes_the_socket_of_a_server_that_was_killed(own):
    server, admins = own
    orphans = server.worker_pids()
    server.process.kill()
    server.process.wait()
    server.start()
    for admin in admins:
        assert admin.ask("/readyz").status == 200
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in orphans))


def test_an_upgrade_hands_every_address_over(own):
    server, admins = own
    workers = server.worker_pids()
    server.process.send_signal(signal.SIGUSR2)
    (new,) = wait_until(lambda: set(server.worker_pids()) - set(workers))
    try:
        wait_until(lambda: server.log.count(" accepts connections") == 6, 20)
        server.process.terminate()
        server.process.wait(20)
        for admin in admins:
            assert len(wait_until(lambda admin=admin: three(admin))) == 3
        assert admins[1].place.stat().st_mode & 0o777 == 0o600
    finally:
        os.kill(new, signal.SIGTERM)
        wait_until(lambda: not is_there(new), 20)


def three(admin: Admin) -> Any:
    workers = admin.status()["workers"]
    return workers if len(workers) == 3 else None


def is_there(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_another_worker_class_does_not_serve_images_there(home):
    admin = Admin(free_port())
    server = Server(home, workers=1, admin_bind=admin.bind)
    server.command += ["--worker-class", "gthread"]
    with server:
        for _ in range(2):
            with pytest.raises(ConnectionRefusedError):
                admin.ask("/healthz")
            pids = server.worker_pids()
            server.process.send_signal(signal.SIGHUP)
            wait_until(lambda pids=pids: not set(pids) & set(server.worker_pids()), 20)
            wait_until(server.worker_pids)
            assert server.request("GET", "/").status == 404
        assert f"nothing listens at IMAGESERVER_ADMIN_BIND={admin.bind}" in server.log
