# SPDX-License-Identifier: Apache-2.0
"""imagectl map, info, check, top and transfer (docs/imagectl.md), against real servers."""

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from tests.system.clients import reading
from tests.system.controlling import Control, controlled, file_of
from tests.system.harness import Server, free_port, qemu_img, qemu_io, qemu_nbd, wait_until
from tests.system.moving import IMAGECTL, filled, finish, imagectl, running
from tests.system.ovirt_daemon import ovirt_daemon
from tests.system.pki import files
from tests.system.watching import Admin, short

MIB = 1 << 20


@pytest.fixture(scope="module")
def server(workplace: Path) -> Iterator[Server]:
    binds = f"127.0.0.1:{free_port()},unix:{workplace}/admin"
    with controlled(workplace, admin_bind=binds, max_writers=2) as running_:
        yield running_


@pytest.fixture(scope="module")
def admin(server: Server) -> str:
    return "http://" + server.env["IMAGESERVER_ADMIN_BIND"].partition(",")[0]


@pytest.fixture
def image(server: Server, home: Path) -> Iterator[str]:
    """The URL of 8 MiB: 1 of data, 1 of changed data, 1 that was zeroed since, 5 of zeros."""
    path = home / "image.qcow2"
    qemu_img("create", "-f", "qcow2", path, "8M")
    qemu_io(path, "qcow2", "write -P 1 0 3M")
    qemu_img("bitmap", "--add", path, "b0")
    qemu_io(path, "qcow2", "write -P 2 1M 1M", "write -z 2M 1M")
    with qemu_nbd(path, "--bitmap=b0", fmt="qcow2") as sock:
        name = str(uuid.uuid4())
        server.add(name, socket=str(sock), export_bitmap="b0")
        yield url_of(server, name)


def url_of(server: Server, name: str) -> str:
    return f"http://127.0.0.1:{server.port}/images/{name}"


# map


def test_map_draws_data_and_zeros_in_cells(image):
    drawn = imagectl("map", "--ascii", "--width", 42, "--rows", 2, image).stdout
    assert [line.rstrip() for line in drawn.splitlines()] == [
        "8 MiB (8388608 bytes), 2 extents",
        "",
        "      0 B ################................",
        "    4 MiB ................................",
        "",
        "          one character is 128 KiB",
        "",
        "#  data  2 MiB  25.0 %  in part: - = +",
        ".  zero  6 MiB  75.0 %",
    ]


def test_map_tells_what_has_changed(image):
    drawn = imagectl(
        "map", "--ascii", "--width", 42, "--rows", 1, "--context", "dirty", image
    ).stdout
    assert [line.rstrip() for line in drawn.splitlines()] == [
        "8 MiB (8388608 bytes), 4 extents",
        "",
        "      0 B ####@@@@0000....................",
        "",
        "          one character is 256 KiB",
        "",
        "#  clean data  1 MiB  12.5 %  in part: - = +",
        ".  clean zero  5 MiB  62.5 %",
        "@  dirty data  1 MiB  12.5 %  in part: i x X",
        "0  dirty zero  1 MiB  12.5 %",
    ]


def test_map_says_so_where_there_is_no_bitmap(server, big, name):
    server.add(name, **big)
    drawn = imagectl("map", "--context", "dirty", url_of(server, name)).stdout
    assert "All of it counts as dirty" in drawn
    assert "█" not in imagectl("map", "--ascii", url_of(server, name)).stdout


@pytest.mark.parametrize("context", ["zero", "dirty"])
def test_map_as_json_is_what_the_server_says_and_its_totals(server, image, context):
    found = json.loads(imagectl("map", "--json", "--context", context, image).stdout)
    path = image.removeprefix(f"http://127.0.0.1:{server.port}")
    extents = server.request("GET", f"{path}/extents?context={context}").json
    totals = {
        "zero": {"data": 2 * MIB, "zero": 6 * MIB},
        "dirty": {
            "clean_data": MIB,
            "clean_zero": 5 * MIB,
            "dirty_data": MIB,
            "dirty_zero": MIB,
        },
    }[context]
    assert found == {"size": 8 * MIB, "context": context, "extents": extents} | {
        "count": len(extents),
        "totals": totals,
    }


def test_map_as_svg_stands_alone_and_hides_the_id(image, home):
    assert imagectl("map", "--svg", home / "map.svg", "--title", "vda", image).stdout == ""
    text = (home / "map.svg").read_text()
    assert ET.fromstring(text).findtext("{http://www.w3.org/2000/svg}title") == (  # noqa: S314
        "vda: 8 MiB, 2 extents"
    )
    assert image.rpartition("/")[2] not in text


def test_an_image_without_extents_or_id_is_one_sentence(server, name, home):
    server.add(name, **file_of(server, "one"))
    for url, sentence in (
        (url_of(server, name), "no extents"),
        (url_of(server, "nobody"), "unknown image_id"),
    ):
        errors = imagectl("map", url, status=3).stderr
        assert sentence in errors
        assert errors.count("\n") == 1
    for command in ("map", "info", "check"):  # without patience: nobody waits to look
        gone = imagectl(command, f"http://127.0.0.1:{free_port()}/images/x", status=1)
        assert re.fullmatch(r"imagectl: cannot connect to .*: Connection refused\n", gone.stderr)
    unwritable = ("map", "--svg", home / "no" / "map.svg")
    assert "no extents" in imagectl(*unwritable, url_of(server, name), status=3).stderr


#: Extents of a large list, and how much memory it may take: imagectl takes 28 MiB for none, and
#: a list of so many tuples would take over 70.
COUNT = 500_000
MOST_KIB = 50 << 10


class _Fragmented(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    count = COUNT

    def log_message(self, *_args: object) -> None: ...

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_OPTIONS(self) -> None:
        self.answer(b'{"features":["extents"]}')

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(self.count * 65536))
        self.end_headers()

    def do_GET(self) -> None:
        pattern = '{"start":%d,"length":65536,"zero":%s}'
        extents = (pattern % (n * 65536, ("false", "true")[n % 2]) for n in range(self.count))
        self.answer(f"[{','.join(extents)}]".encode())


@contextlib.contextmanager
def fragmented(count: int) -> Iterator[str]:
    """Serve an image of so many extents, and nothing but extents; yield its URL."""
    handler = type("Handler", (_Fragmented,), {"count": count})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/images/x"
        finally:
            server.shutdown()
            thread.join()


def peak_kib(command: list[str], output: Path) -> int:
    """Run a command to its end; return the most memory that it had."""
    peak = 0
    with output.open("wb") as file, subprocess.Popen(command, stdout=file) as started:
        status = Path(f"/proc/{started.pid}/status")
        while started.poll() is None:
            found = re.search(r"^VmHWM:\s+([0-9]+) kB$", status.read_text(), re.MULTILINE)
            peak = max(peak, int(found[1]) if found else 0)
            time.sleep(0.005)
    assert started.returncode == 0
    return peak


@pytest.mark.parametrize("how", ["--ascii", "--json"])
def test_half_a_million_extents_take_no_more_memory_than_few(home, how):
    with fragmented(COUNT) as url:
        assert 0 < peak_kib([*IMAGECTL, "map", how, url], home / "output") < MOST_KIB
    output = (home / "output").read_bytes()
    assert str(COUNT).encode() in output[:100] + output[-100:]


# info


def test_info_shows_size_and_abilities(image):
    shown = dict(
        re.split(r"  +", line.rstrip(), maxsplit=1)
        for line in imagectl("info", "--extents", image).stdout.splitlines()
    )
    assert shown == {
        "size": "8 MiB (8388608 bytes)",
        "features": "extents, flush, zero",
        "methods": "GET, HEAD, OPTIONS, PATCH, PUT",
        "readers": "up to 8",
        "writers": "up to 2",
        "Unix socket": "none",
        "extents": "2",
        "data": "2 MiB, 25.0 %",
        "zero": "6 MiB, 75.0 %",
    }


def test_info_as_json(server, name):
    server.add(name, **file_of(server, "one"), read_only=True)
    assert json.loads(imagectl("info", "--json", url_of(server, name)).stdout) == {
        "size": 3,
        "features": ["flush"],
        "max_readers": 8,
        "max_writers": 0,
        "methods": ["GET", "HEAD", "OPTIONS", "POST"],
        "unix_socket": None,
    }


# check


def checked(*arguments: object) -> dict[str, str]:
    found = json.loads(imagectl("check", "--json", *arguments).stdout)
    assert found["ok"] is True
    return {one["check"]: one["verdict"] for one in found["checks"]}


def test_our_server_holds_all_it_announces_and_keeps_its_bytes(server, image):
    path = image.removeprefix(f"http://127.0.0.1:{server.port}")
    before = server.request("GET", path).body
    assert set(checked("--write", image).values()) == {"ok"}
    assert server.request("GET", path).body == before


def test_all_holds_over_tls_with_certificates_and_over_a_unix_socket(home, pki):
    image = filled(home / "image", 3 * MIB, (0, MIB))
    sock = home / "http"
    settings = files(pki, client_ca=True)
    settings["bind"] = f"127.0.0.1:{free_port()},unix:{sock}"
    with qemu_nbd(image) as nbd, Server(home, **settings) as server:
        path = server.add("x", socket=str(nbd))
        own = (
            "--cacert",
            pki / "ca.crt",
            "--cert",
            pki / "client.crt",
            "--key",
            pki / "client.key",
        )
        port = settings["bind"].partition(",")[0].rpartition(":")[2]
        over_tls = checked("--write", *own, f"https://localhost:{port}{path}")
        over_unix = checked("--write", "--unix-socket", sock, f"http://localhost{path}")
        assert set(over_tls.values()) == set(over_unix.values()) == {"ok"}
        errors = imagectl("check", *own[:2], f"https://localhost:{port}{path}", status=1).stderr
        assert errors.count("\n") == 1


def test_an_empty_image_can_be_looked_at(home, server, name):
    (home / "empty").touch()
    with qemu_nbd(home / "empty") as sock:
        server.add(name, socket=str(sock))
        url = url_of(server, name)
        assert imagectl("map", "--ascii", url).stdout.startswith("0 B (0 bytes), 0 extents\n")
        assert json.loads(imagectl("map", "--json", url).stdout)["extents"] == []
        assert "failed" not in checked("--write", url).values()


def test_what_a_file_lacks_is_missing_and_no_failure(server, name):
    server.add(name, **file_of(server, "two"))
    verdicts = checked(url_of(server, name))
    assert {check for check, verdict in verdicts.items() if verdict != "ok"} == {
        "extents",
        "dirty extents",
        "extents of a span",
        "extents' context",
    }


def test_a_check_without_write_writes_nothing(server, image):
    path = image.removeprefix(f"http://127.0.0.1:{server.port}")
    extents = f"{path}/extents?context=dirty"
    before = server.request("GET", extents).json
    checked(image)
    assert server.request("GET", extents).json == before
    told = [line for line in server.log.splitlines() if path.rpartition("/")[2] in line]
    assert not [line for line in told if "op=write" in line or "op=zero" in line]


def test_ovirts_daemon_differs_and_does_not_fail(home):
    path = home / "disk"
    with path.open("wb") as file:
        file.truncate(4 * MIB)
        file.write(b"data" * 4096)
    with qemu_nbd(path) as sock, ovirt_daemon(home / "ovirt") as daemon:
        before = path.read_bytes()
        verdicts = checked("--write", daemon.add_nbd(sock, 4 * MIB))
        shown = imagectl("check", daemon.add_nbd(sock, 4 * MIB)).stdout
        assert path.read_bytes() == before
    assert verdicts["malformed ranges"] == verdicts["If-Range"] == "differs"
    assert verdicts["HEAD"] == verdicts["dirty extents"] == "missing"
    assert {verdicts[name] for name in ("extents", "flush", "write inside", "keep-alive")} == {"ok"}
    assert shown.splitlines()[-1].endswith(" missing, 0 failed")


def test_a_server_that_lies_is_told_by_the_exit_status():
    with fragmented(10) as url:
        done = imagectl("check", url, status=4)
    assert re.search(r"^✗ range beyond the end +failed", done.stdout, re.MULTILINE)
    assert re.fullmatch(r"imagectl: [0-9]+ of [0-9]+ checks failed: .*\n", done.stderr)


def test_a_busy_image_is_waited_for_and_then_told(server, big, name):
    server.add(name, **big)
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(reading(server, f"/images/{name}"))
        errors = imagectl("check", "--patience", 0.3, url_of(server, name), status=1).stderr
    assert errors == "imagectl: the server is busy: too many parallel reads\n"


# top


def test_top_shows_what_runs_over_all_workers(server, admin, big, name):
    server.add(name, **big)
    with reading(server, f"/images/{name}"):
        found = json.loads(imagectl("top", "--once", "--json", admin).stdout)
        transfer = found["transfers"][0]
        same = ("id", "operation", "client", "worker", "expected")
        told = Admin(int(admin.rpartition(":")[2])).transfers()[0]
        assert {key: transfer[key] for key in same} == {key: told[key] for key in same}
        assert {worker["pid"] for worker in found["workers"]} == set(server.worker_pids())
        shown = imagectl("top", "--once", f"unix:{server.directory}/admin").stdout
        assert re.search(rf"^{name[:11]}. +read +127.0.0.1 ", shown, re.MULTILINE)
        assert short(name) in imagectl("top", "--once", admin).stdout


def test_top_asked_of_another_listener_is_one_sentence(server):
    errors = imagectl("top", f"http://127.0.0.1:{server.port}", status=3).stderr
    assert (errors.count("\n"), "not found" in errors) == (1, True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_top_ends_with_a_signal_and_has_shown_each_poll(server, admin, number):
    with running("top", "--interval", 0.1, "--json", admin) as started:
        lines = [json.loads(started.stdout.readline()) for _ in range(3)]
        started.send_signal(number)
        assert finish(started) == ""
    assert [len(line["workers"]) for line in lines] == [3, 3, 3]


class Screen:
    """A terminal on which a command runs."""

    def __init__(self, *arguments: object) -> None:
        self.pid, self.fd = pty.fork()
        if not self.pid:
            env = os.environ | {"TERM": "xterm", "COLUMNS": "120", "LINES": "24"}
            command = [*IMAGECTL, *map(str, arguments)]
            os.execve(command[0], command, env)  # noqa: S606 - beside pytest, no shell
        self.seen = ""

    def shows(self, text: str) -> bool:
        """Tell whether a text has come since the last call that found its own."""
        with contextlib.suppress(OSError):
            self.seen += os.read(self.fd, 65536).decode(errors="replace")
        _, found, after = self.seen.partition(text)
        self.seen = after if found else self.seen
        return bool(found)

    def ends(self) -> int:
        while True:
            try:
                if not os.read(self.fd, 65536):
                    break
            except OSError:
                break
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@contextlib.contextmanager
def screen(*arguments: object) -> Iterator[Screen]:
    shown = Screen(*arguments)
    try:
        yield shown
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(shown.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(shown.pid, 0)
        os.close(shown.fd)


@pytest.mark.filterwarnings("ignore:.*forkpty:DeprecationWarning")
def test_top_goes_on_when_the_server_goes_away_and_comes_back(home):
    port = free_port()
    server = Server(home, workers=1, admin_bind=f"127.0.0.1:{port}")
    with server, screen("top", "--interval", 0.1, f"http://127.0.0.1:{port}") as shown:
        wait_until(lambda: shown.shows("1 accepting"))
        server.stop()
        wait_until(lambda: shown.shows("Connection refused; trying again"))
        server.start()
        wait_until(lambda: shown.shows("1 accepting"))
        os.write(shown.fd, b"q")
        assert shown.ends() == 0


# transfer


def test_a_transfer_is_added_served_listed_and_removed_by_the_control_socket(server, home):
    place = ("--control-socket", server.directory / "control")
    given = ("--file", server.directory / "one", "--read-only", "--idle-timeout", 60)
    base = f"http://127.0.0.1:{server.port}"
    lines = imagectl("transfer", "add", *place, *given, "--url", base).stdout.splitlines()
    name = str(uuid.UUID(lines[0]))
    assert lines == [name, f"{base}/images/{name}"]
    assert server.request("GET", f"/images/{name}").body == b"one"
    config = {
        **file_of(server, "one"),
        "read_only": True,
        "idle_timeout_seconds": 60,
    }
    listed = json.loads(imagectl("transfer", "list", "--json", *place).stdout)
    assert listed == {"transfers": [{"id": name, "config": config}]}
    table = imagectl("transfer", "list", *place).stdout.splitlines()
    assert re.split(r"  +", table[1].rstrip()) == [
        name,
        str(server.directory / "one"),
        "read",
        "60 s unused",
    ]
    assert imagectl("transfer", "remove", *place, name).stdout == ""
    assert server.request("GET", f"/images/{name}").status == 404
    assert Control(server.directory / "control").list()["transfers"] == []


def test_a_transfer_is_added_served_listed_and_removed_as_a_file(server, big):
    place = ("--config-dir", server.config)
    given = ("--nbd", big["socket"], "--id", "a b", "--bitmap", "b0")
    added = imagectl("transfer", "add", "--json", *place, *given, "--url", "http://h:1/").stdout
    assert json.loads(added) == {"id": "a b", "url": "http://h:1/images/a%20b"}
    assert server.request("HEAD", "/images/a%20b").status == 200
    listed = json.loads(imagectl("transfer", "list", "--json", *place).stdout)["transfers"]
    assert "a b" in [transfer["id"] for transfer in listed]
    imagectl("transfer", "remove", *place, "a b")
    assert server.request("HEAD", "/images/a%20b").status == 404


def test_requests_under_way_are_waited_for_or_cut(server, big, name):
    place = ("--control-socket", server.directory / "control")
    imagectl("transfer", "add", *place, "--nbd", big["socket"], "--id", name)
    with reading(server, f"/images/{name}"):
        busy = imagectl("transfer", "remove", *place, "--timeout", 0.1, name, status=1)
        assert busy.stderr == (
            "imagectl: the server said: busy; requests still use the transfer, "
            "which new ones cannot\n"
        )
        imagectl("transfer", "remove", *place, "--force", name)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("add", "--config-dir", "."), "name the image"),
        (("add", "--config-dir", ".", "--nbd", "s", "--file", "f"), "name the image"),
        (("add", "--config-dir", ".", "--file", "f", "--bitmap", "b"), "belong to --nbd"),
        (("add", "--config-dir", ".", "--file", "f", "--id", "a/b"), "cannot be an id"),
        (("add", "--config-dir", ".", "--nbd", "s" * 200), "at most 107 bytes"),
        (("add", "--file", "f"), "say where the server looks"),
        (("list", "--config-dir", ".", "--control-socket", "s"), "exclude each other"),
    ],
)
def test_wrong_arguments_are_told_so(arguments, sentence, monkeypatch):
    for variable in ("IMAGESERVER_CONTROL_SOCKET", "IMAGESERVER_CONFIG_DIR"):
        monkeypatch.delenv(variable, raising=False)
    assert sentence in imagectl("transfer", *arguments, status=2).stderr


def test_where_the_server_looks_may_come_from_its_own_variables(server, monkeypatch):
    monkeypatch.setenv("IMAGESERVER_CONFIG_DIR", str(server.config))
    monkeypatch.delenv("IMAGESERVER_CONTROL_SOCKET", raising=False)
    server.add("from-file", **file_of(server, "one"))
    assert "from-file" in imagectl("transfer", "list").stdout
    monkeypatch.setenv("IMAGESERVER_CONTROL_SOCKET", str(server.directory / "control"))
    assert "from-file" not in imagectl("transfer", "list").stdout
    assert "from-file" in imagectl("transfer", "list", "--config-dir", server.config).stdout
