# SPDX-License-Identifier: Apache-2.0
"""Starting, refusing to start, stopping; and the same application started otherwise."""

import contextlib
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.clients import putting, reading
from tests.system.harness import GUNICORN, ROOT, Server, exchange, qemu_nbd, repeatable, wait_until

SIZE = 64 << 20
IMAGE = repeatable("start").randbytes(3 << 20)


def environment(**settings: object) -> dict[str, str]:
    env = {name: text for name, text in os.environ.items() if not name.startswith("IMAGESERVER_")}
    return env | {f"IMAGESERVER_{name.upper()}": str(value) for name, value in settings.items()}


def run(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=30, check=False
    )


CHECK = [sys.executable, "-m", "imageserver", "--check"]
SERVE = [str(GUNICORN)]

#: What is wrong: how it is made so (settings of the server in a directory), and what the
#: sentence must name, the remedy included.
WRONG = {
    "number": (lambda _: {"workers": "many"}, ["IMAGESERVER_WORKERS", "'many'", "whole number"]),
    "out of range": (lambda _: {"max_readers": 0}, ["IMAGESERVER_MAX_READERS", "from 1 to"]),
    "address": (lambda _: {"bind": "nowhere"}, ["IMAGESERVER_BIND", "HOST:PORT"]),
    "relative path": (lambda _: {"config_dir": "x"}, ["IMAGESERVER_CONFIG_DIR", "absolute path"]),
    "no such setting": (lambda _: {"max_reader": 1}, ["IMAGESERVER_MAX_READER ", "not a setting"]),
    "address in another spelling": (
        lambda _: {"bind": "127.0.0.1:54999", "admin_bind": "localhost:54999"},
        ["IMAGESERVER_ADMIN_BIND: localhost:54999 is an address of IMAGESERVER_BIND", "another"],
    ),
    "address among all addresses": (
        lambda _: {"bind": "0.0.0.0:54999", "admin_bind": "127.0.0.1:54999"},
        ["IMAGESERVER_ADMIN_BIND: 127.0.0.1:54999", "IMAGESERVER_BIND already (0.0.0.0:54999)"],
    ),
    "address twice": (
        lambda _: {"admin_bind": "127.0.0.1:54999,127.0.0.1:54999"},
        ["127.0.0.1:54999 is an address of IMAGESERVER_ADMIN_BIND already", "another"],
    ),
    "socket in another spelling": (
        lambda home: {"bind": f"unix:{home}/s", "admin_bind": f"unix:{home}//s"},
        ["IMAGESERVER_ADMIN_BIND: unix:", "//s is an address of IMAGESERVER_BIND already"],
    ),
    "socket through a link": (
        lambda home: {
            "control_socket": home / "s",
            "admin_bind": f"unix:{_link(home / 'link', home)}/s",
        },
        ["IMAGESERVER_ADMIN_BIND", "is an address of IMAGESERVER_CONTROL_SOCKET already"],
    ),
    "config directory of others": (
        lambda home: {"config_dir": _directory(home / "config", 0o777)},
        ["IMAGESERVER_CONFIG_DIR", "can be written by group or others", "chmod"],
    ),
    "config directory is a file": (
        lambda home: {"config_dir": _file(home / "config")},
        ["IMAGESERVER_CONFIG_DIR", "irectory"],
    ),
    "runtime directory is a file": (
        lambda home: {"runtime_dir": _file(home / "runtime")},
        ["IMAGESERVER_RUNTIME_DIR", "remove it or choose another"],
    ),
    "runtime directory is a link": (
        lambda home: {"runtime_dir": _link(home / "runtime", home)},
        ["IMAGESERVER_RUNTIME_DIR", "remove it or choose another"],
    ),
    "runtime directory cannot be made": (
        lambda _: {"runtime_dir": "/proc/imageserver"},
        ["IMAGESERVER_RUNTIME_DIR", "/proc/imageserver", "choose another"],
    ),
}


def _directory(path: Path, mode: int) -> Path:
    path.mkdir()
    path.chmod(mode)
    return path


def _file(path: Path) -> Path:
    path.write_bytes(b"")
    return path


def _link(path: Path, target: Path) -> Path:
    path.symlink_to(target)
    return path


def assert_one_sentence(done: subprocess.CompletedProcess[str], words: list[str]) -> None:
    """Refused with one line that says what to do; gunicorn may have said that it starts."""
    assert done.returncode not in {0, -6, -11}, done
    lines = [line for line in done.stderr.splitlines() if line and "[INFO]" not in line]
    assert len(lines) == 1, lines
    assert re.fullmatch(r"imageserver: .*[.?]", lines[0])
    assert [word for word in words if word not in lines[0]] == []


@pytest.mark.parametrize("command", [CHECK, SERVE], ids=["check", "serve"])
@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_told_in_one_sentence(home, name, command):
    make, words = WRONG[name]
    settings = {"runtime_dir": home / "run", "config_dir": home / "none"} | make(home)
    assert_one_sentence(run(command, environment(**settings)), words)


@pytest.mark.parametrize("command", [CHECK, SERVE], ids=["check", "serve"])
def test_a_missing_libnbd_is_told_in_one_sentence(home, command):
    (home / "nbd.py").write_text("raise ImportError('libnbd.so.0: cannot open shared object file')")
    settings = environment(runtime_dir=home / "run", config_dir=home / "none")
    done = run(command, settings | {"PYTHONPATH": str(home)})
    assert_one_sentence(done, ["libnbd", "install", "python3-libnbd"])


def test_a_port_in_use_is_told_in_one_sentence(home):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        settings = environment(
            bind=address, runtime_dir=home / "run", config_dir=_directory(home / "config", 0o700)
        )
        done = run(SERVE, settings)
    assert_one_sentence(done, [address, "in use", "IMAGESERVER_BIND"])


def test_a_socket_of_a_living_server_is_not_taken(home):
    path = home / "images"
    with Server(home, workers=1, bind=f"unix:{path}") as server:
        found = path.stat().st_ino
        env = server.env | {"IMAGESERVER_RUNTIME_DIR": str(home / "other")}
        assert_one_sentence(run(SERVE, env), ["IMAGESERVER_BIND", str(path), "stop it first"])
        assert path.stat().st_ino == found
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
        server.process.kill()  # its successor may have it
        server.process.wait()
        server.start()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))


def test_a_missing_config_directory_is_a_warning_and_is_found_when_it_comes(home):
    with Server(home) as server:
        (home / "config").rmdir()
        assert server.request("GET", "/images/x").refusal == (404, "unknown image_id")
        server.stop()
        server.start()
        assert f"{home}/config does not exist yet" in server.log
        assert server.request("GET", "/images/x").refusal == (404, "unknown image_id")
        _directory(home / "config", 0o700)
        (home / "image").write_bytes(IMAGE)
        url = server.add("x", backend="file", file=str(home / "image"))
        assert server.request("GET", url).body == IMAGE


def test_check_says_ok_and_leaves_nothing_running(home):
    settings = {"runtime_dir": home / "run", "config_dir": _directory(home / "config", 0o755)}
    done = run(CHECK, environment(**settings))
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")


def test_check_warns_of_a_missing_config_directory(home):
    done = run(CHECK, environment(runtime_dir=home / "run", config_dir=home / "none"))
    assert done.returncode == 0
    assert done.stdout.startswith(f"warning: config directory {home}/none does not exist yet")
    assert done.stdout.endswith("\nok\n")


def test_show_config_prints_what_may_be_set_again(home):
    show = [sys.executable, "-m", "imageserver", "--show-config"]
    done = run(show, environment(runtime_dir=home / "run", workers=7, client_timeout=1.5))
    shown = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert (done.returncode, done.stderr) == (0, "")
    assert shown["IMAGESERVER_WORKERS"] == "7"
    assert shown["IMAGESERVER_CLIENT_TIMEOUT"] == "1.5"
    assert shown["IMAGESERVER_MAX_READERS"] == "8"
    assert shown["IMAGESERVER_CONFIG_DIR"] == "/tmp/imagetransfer"  # noqa: S108 - its default
    assert run(show, environment() | shown).stdout == done.stdout


def pids_of(server: Server) -> list[int]:
    assert server.process is not None
    return [server.process.pid, *server.worker_pids()]


def test_sigterm_ends_every_process_and_leaves_nothing_held(home):
    (home / "image").write_bytes(IMAGE)
    with Server(home) as server:
        url = server.add("x", backend="file", file=str(home / "image"))
        wait_until(lambda: len(server.worker_pids()) == 3)
        assert server.request("PUT", url, IMAGE).status == 200
        pids = pids_of(server)
        with server.raw():  # an idle connection does not keep the server
            assert server.stop() == 0
        assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []
        with pytest.raises(ConnectionRefusedError):
            server.raw()
        assert server.holders() == []
        assert [path.stat().st_size for path in (home / "run" / "locks").iterdir()] == [0]
        server.start()
        assert server.request("PUT", url, IMAGE).status == 200


def test_a_server_that_was_killed_leaves_its_successor_free_to_work(home, sparse):
    with Server(home, max_readers=1, drain_timeout=1) as server:
        server.add("big", socket=str(sparse), export="e")
        with reading(server, "/images/big"), putting(server, "/images/big", SIZE, bytes(1 << 20)):
            assert server.process is not None
            orphans = server.worker_pids()
            server.process.kill()
            server.process.wait()
            for pid in orphans:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            server.start()
            part = server.request("GET", "/images/big", headers={"Range": "bytes=0-9"})
            assert part.status == 206
            assert server.request("PUT", "/images/big", bytes(SIZE)).status == 200


@pytest.fixture(scope="module")
def sparse(workplace: Path) -> Iterator[Path]:
    path = workplace / "sparse"
    with path.open("wb") as file:
        file.truncate(SIZE)
    with qemu_nbd(path, export="e") as sock:
        yield sock


def test_preloading_keeps_the_limits(home, sparse):
    """Children of a master that has opened table and locks must not share its right to them."""
    server = Server(home, max_readers=2)
    server.command.append("--preload")
    with server:
        server.add("big", socket=str(sparse), export="e")
        with contextlib.ExitStack() as stack:
            connections = [stack.enter_context(contextlib.closing(server.connect())) for _ in "abc"]
            with reading(server, "/images/big"), reading(server, "/images/big"):
                for connection in connections:
                    answer = exchange(connection, "GET", "/images/big")
                    assert answer.refusal == (503, "too many parallel reads")
            with putting(server, "/images/big", SIZE):
                for connection in connections:
                    answer = exchange(connection, "PUT", "/images/big", b"")
                    assert answer.refusal == (409, "image busy")
        wait_until(lambda: server.holders() == [])
        for _ in range(20):
            assert server.request("PUT", "/images/big", bytes(SIZE)[:1]).status == 400
            assert server.request("GET", "/images/big/extents").status == 200


@pytest.mark.parametrize("backend", ["nbd", "file"])
def test_plain_gthread_serves_the_same_bytes(home, backend):
    image = home / "image"
    image.write_bytes(bytes(len(IMAGE)))
    server = Server(home, workers=1)  # one: gunicorn loses a SIGTERM that meets a booting worker
    server.command += ["--worker-class", "gthread"]
    with server, qemu_nbd(image) as sock:
        place = {"socket": str(sock)} if backend == "nbd" else {"file": str(image)}
        url = server.add("x", backend=backend, **place)
        put = server.request("PUT", url, IMAGE)
        assert (put.status, put.json) == (200, {"ok": True, "bytes_written": len(IMAGE)})
        assert server.request("GET", url).body == IMAGE
        part = server.request("GET", url, headers={"Range": "bytes=1000000-2500000"})
        assert (part.status, part.body) == (206, IMAGE[1_000_000:2_500_001])
        assert server.request("POST", f"{url}/flush").json == {"ok": True}
        assert server.request("GET", "/images/none").refusal == (404, "unknown image_id")
        assert server.holders() == []


def test_a_worker_told_to_stop_while_it_boots_does_stop(home):
    """The master says it once; were it lost, the server would linger for the drain timeout."""
    with Server(home, workers=1) as server:
        wait_until(lambda: len(server.worker_pids()) == 1)
        settled = server.worker_pids()
        with (home / "run" / "slots").open("rb+") as table:
            fcntl.flock(table, fcntl.LOCK_EX)  # the table's guard: a new worker waits for it
            assert server.process is not None
            server.process.send_signal(signal.SIGTTIN)  # gunicorn: one worker more
            (young,) = wait_until(lambda: set(server.worker_pids()) - set(settled))
            os.kill(young, signal.SIGTERM)
        wait_until(lambda: not Path(f"/proc/{young}").exists(), 5)
        assert server.request("GET", "/images/x").status == 404
