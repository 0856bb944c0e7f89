# SPDX-License-Identifier: Apache-2.0
"""OPTIONS of NBD images, routes and methods (docs/api.md): what probes and clients are told."""

import contextlib
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.system.answers import COMMON, assert_only_common_fields
from tests.system.harness import Answer, Server, nbdkit, process, program, qemu_nbd

WRITABLE = "GET, PUT, PATCH, OPTIONS"
READ_ONLY = "GET, OPTIONS"
READING = ["extents", "checksum", "qcow2"]
BOTH = ["extents", "zero", "flush", "digest", "checksum", "qcow2"]
#: What the contract gives a server to finish its handshake, and a busy machine to notice.
SECOND = 1.0
SLACK = 1.5


def announced(features: list[str], writers: int) -> dict[str, Any]:
    return {
        "unix_socket": None,
        "features": features,
        "max_readers": 8,
        "max_writers": writers,
    }


def assert_announces(answer: Answer, features: list[str], methods: str) -> None:
    assert (answer.status, answer.json) == (200, announced(features, int(methods == WRITABLE)))
    assert set(answer.fields.pop("allow", "").split(", ")) == {"HEAD", *methods.split(", ")}
    assert {k: v for k, v in answer.fields.items() if k != "allow"} == COMMON | {
        "access-control-allow-methods": methods,
        "content-length": str(len(answer.body)),
    }


def no_method(missing: str) -> tuple[str, ...]:
    """Return the arguments of a writable nbdkit without zero or flush."""
    others = {"can_zero": "exit 0", "can_flush": "exit 0"} | {missing: "exit 3"}
    scripts = ("pread=exit 1", "pwrite=exit 1", "zero=exit 1", "flush=exit 1", "can_write=exit 0")
    return ("eval", "get_size=echo 1M", *scripts, *(f"{k}={v}" for k, v in others.items()))


@pytest.mark.parametrize(
    ("arguments", "read_only", "features", "methods"),
    [
        (("memory", "1M"), None, BOTH, WRITABLE),
        (("memory", "1M"), False, BOTH, WRITABLE),
        (("memory", "1M"), True, READING, READ_ONLY),
        (("-r", "memory", "1M"), None, READING, READ_ONLY),
        (("-r", "memory", "1M"), False, READING, READ_ONLY),
        (("--filter=noextents", "memory", "1M"), None, BOTH, WRITABLE),
        (
            ("--filter=nozero", "memory", "1M"),
            None,
            ["extents", "flush", "digest", "checksum", "qcow2"],
            WRITABLE,
        ),
        (
            no_method("can_flush"),
            None,
            ["extents", "zero", "digest", "checksum", "qcow2"],
            WRITABLE,
        ),
        (
            ("--filter=nozero", *no_method("can_flush")),
            None,
            ["extents", "digest", "checksum", "qcow2"],
            WRITABLE,
        ),
    ],
    ids=[
        "writable",
        "writable_as_configured",
        "configured_read_only",
        "read_only_export",
        "read_only_export_whatever_is_configured",
        "without_block_status",
        "without_zero",
        "without_flush",
        "with_neither",
    ],
)
def test_options_says_what_the_export_can_do(
    server: Server,
    workplace: Path,
    arguments: tuple[str, ...],
    read_only: bool | None,
    features: list[str],
    methods: str,
):
    with nbdkit(workplace / "able.sock", *arguments) as sock:
        path = server.add("able", socket=str(sock), read_only=read_only)
        assert_announces(server.request("OPTIONS", path), features, methods)


@pytest.mark.parametrize("options", [(), ("-r",)], ids=["writable", "read_only"])
def test_options_of_qemu_nbd(server: Server, workplace: Path, options: tuple[str, ...]):
    disk = workplace / "disk"
    disk.write_bytes(bytes(4096))
    with qemu_nbd(disk, *options, export="vda") as sock:
        answer = server.request("OPTIONS", server.add("qemu", socket=str(sock), export="vda") + "/")
    expected = (READING, READ_ONLY) if options else (BOTH, WRITABLE)
    assert_announces(answer, *expected)


# Servers that do not answer


@contextlib.contextmanager
def missing(path: Path) -> Iterator[Path]:
    yield path


@contextlib.contextmanager
def nobody(path: Path) -> Iterator[Path]:
    """A socket at which nobody listens any more."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
    yield path


@contextlib.contextmanager
def silent(path: Path) -> Iterator[Path]:
    """A server that accepts and says nothing."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen(64)
        yield path


@contextlib.contextmanager
def full(path: Path) -> Iterator[Path]:
    """A server whose backlog has no room."""
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(socket.socket(socket.AF_UNIX))
        sock.bind(str(path))
        sock.listen(0)
        stack.enter_context(socket.socket(socket.AF_UNIX)).connect(str(path))
        yield path


@contextlib.contextmanager
def rude(path: Path) -> Iterator[Path]:
    """A server that hangs up during the handshake."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen(64)

        def hang_up() -> None:
            with contextlib.suppress(OSError):
                while True:
                    with sock.accept()[0] as client:
                        client.sendall(b"NBDMAGIC")

        thread = threading.Thread(target=hang_up)
        thread.start()
        yield path
        sock.shutdown(socket.SHUT_RDWR)
        thread.join()


@contextlib.contextmanager
def occupied(path: Path) -> Iterator[Path]:
    """A qemu-nbd for one client, which it has."""
    disk = path.with_suffix(".raw")
    disk.write_bytes(bytes(4096))
    with qemu_nbd(disk, "--shared=1", sock=path), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        assert client.recv(8) == b"NBDMAGIC"
        yield path


@contextlib.contextmanager
def stopped(path: Path) -> Iterator[Path]:
    """A server that is stopped (SIGSTOP)."""
    command = [program("nbdkit"), "--foreground", "--exit-with-parent", f"--unix={path}", "null"]
    with process(command, path.exists) as running:
        running.send_signal(signal.SIGSTOP)
        yield path


@pytest.mark.parametrize("read_only", [None, True], ids=["writable", "configured_read_only"])
@pytest.mark.parametrize("how", [missing, nobody, silent, full, rude, occupied, stopped])
def test_options_of_a_server_that_does_not_answer_comes_from_the_configuration(
    server: Server, workplace: Path, how: Any, read_only: bool | None
):
    name = f"{how.__name__}-{read_only}"
    with how(workplace / f"{name}.sock") as sock:
        path = server.add(name, socket=str(sock), read_only=read_only)
        began = time.monotonic()
        answer = server.request("OPTIONS", path)
        took = time.monotonic() - began
    expected = (READING, READ_ONLY) if read_only else (BOTH, WRITABLE)
    assert_announces(answer, *expected)
    assert took < SECOND + SLACK
    warnings = [line for line in server.log.splitlines() if f"transfer={name} " in line]
    assert len(warnings) == 1
    assert "[WARNING]" in warnings[0]


def test_options_ask_a_silent_server_once_per_worker_at_a_time(server: Server, workplace: Path):
    path, asked = workplace / "counted.sock", []
    with socket.socket(socket.AF_UNIX) as listener, ThreadPoolExecutor(24) as pool:
        listener.bind(str(path))
        listener.listen(64)
        listener.settimeout(SECOND / 2)
        image = server.add("counted", socket=str(path))
        answers = [pool.submit(server.request, "OPTIONS", image) for _ in range(24)]
        with contextlib.suppress(TimeoutError):
            while True:
                asked.append(listener.accept()[0])
        for sock in asked:
            sock.close()
        assert {future.result().status for future in answers} == {200}
    assert 1 <= len(asked) <= server.workers


def test_a_probe_that_gave_up_leaves_no_connection_behind(server: Server, workplace: Path):
    path = workplace / "left.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        assert server.request("OPTIONS", server.add("left", socket=str(path))).status == 200
        with listener.accept()[0] as asked:
            asked.settimeout(5)
            assert asked.recv(1) == b""


def test_a_probe_that_gave_up_takes_nobodys_place(server: Server, workplace: Path):
    disk, path = workplace / "place.raw", workplace / "place.sock"
    disk.write_bytes(b"x" * 512)
    image = server.add("place", socket=str(path))
    with qemu_nbd(disk, "--shared=1", sock=path):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            assert client.recv(8) == b"NBDMAGIC"
            assert server.request("OPTIONS", image).status == 200
        assert server.request("GET", image, timeout=5).body == b"x" * 512


# What may be remembered


def test_options_forget_what_another_server_at_the_same_socket_said(
    server: Server, workplace: Path
):
    path = workplace / "changing.sock"
    image = server.add("changing", socket=str(path))
    for arguments, features in (
        (("--filter=nozero", "memory", "1M"), ["extents", "flush", "digest", "checksum", "qcow2"]),
        (("memory", "1M"), BOTH),
        (no_method("can_flush"), ["extents", "zero", "digest", "checksum", "qcow2"]),
    ):
        with nbdkit(path, *arguments):
            for _ in range(5):
                assert server.request("OPTIONS", image).json["features"] == features


def test_options_follow_a_change_of_the_transfer_at_once(server: Server, workplace: Path):
    without_zero = ["extents", "flush", "digest", "checksum", "qcow2"]
    with (
        nbdkit(workplace / "one.sock", "memory", "1M") as one,
        nbdkit(workplace / "two.sock", "--filter=nozero", "memory", "1M") as two,
    ):
        for _ in range(3):
            path = server.add("swap", socket=str(one))
            assert_announces(server.request("OPTIONS", path), BOTH, WRITABLE)
            server.add("swap", socket=str(two))
            assert_announces(server.request("OPTIONS", path), without_zero, WRITABLE)
            server.add("swap", socket=str(two), read_only=True)
            assert_announces(server.request("OPTIONS", path), READING, READ_ONLY)


def test_operations_ask_the_export_itself_whatever_options_said(server: Server, workplace: Path):
    path = workplace / "late.sock"
    image = server.add("late", socket=str(path))
    assert server.request("OPTIONS", image).json == announced(BOTH, 1)
    with nbdkit(path, "-r", "memory", "512"):
        answer = server.request("PUT", image, bytes(512))
        assert (answer.status, answer.fields["allow"]) == (405, "GET, HEAD, OPTIONS")


# Routes and methods


@pytest.fixture
def image(server: Server, workplace: Path) -> Iterator[str]:
    with nbdkit(workplace / "image.sock", "memory", "1M") as sock:
        yield server.add("image", socket=str(sock))


@pytest.mark.parametrize("method", ["GET", "OPTIONS", "PUT", "DELETE"])
@pytest.mark.parametrize(
    "target", ["/", "/images", "/images/", "/image/x", "/images/image/other", "/images/image/a/b"]
)
def test_an_unknown_route_is_not_found(server: Server, image: str, method: str, target: str):
    answer = server.request(method, target)
    assert (answer.status, answer.json) == (404, {"error": "not found"})
    assert_only_common_fields(answer)


@pytest.mark.parametrize("target", ["/extents", "/flush", "/extents/", "/flush/"])
def test_sub_routes_have_no_options(server: Server, image: str, target: str):
    answer = server.request("OPTIONS", image + target)
    assert (answer.status, answer.json) == (404, {"error": "not found"})


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE"])
def test_an_unknown_id_is_said_to_be_one(server: Server, method: str):
    answer = server.request(method, "/images/nobody")
    body = b"" if method == "HEAD" else b'{"error":"unknown image_id"}'
    assert (answer.status, answer.body) == (404, body)
    assert answer.fields == COMMON | {"content-length": "28"}


IMAGE_METHODS = {"GET", "HEAD", "PUT", "PATCH", "OPTIONS"}


@pytest.mark.parametrize(
    ("method", "target", "read_only", "allowed"),
    [
        *((method, "", False, IMAGE_METHODS) for method in ("POST", "DELETE", "TRACE", "FOO")),
        *(
            (method, "", True, {"GET", "HEAD", "OPTIONS"})
            for method in ("PUT", "PATCH", "POST", "DELETE")
        ),
        *((method, "/extents", False, {"GET"}) for method in ("PUT", "POST", "PATCH", "DELETE")),
        *((method, "/flush", False, {"POST"}) for method in ("GET", "PUT", "PATCH", "DELETE")),
    ],
    ids=lambda value: " ".join(sorted(value)) if isinstance(value, set) else str(value),
)
def test_a_method_that_the_resource_lacks_is_refused_with_allow(
    server: Server, image: str, method: str, target: str, read_only: bool, allowed: set[str]
):
    path = server.add("image", socket=str(server.directory / "image.sock"), read_only=read_only)
    answer = server.request(method, path + target, b"x")
    assert (answer.status, list(answer.json)) == (405, ["error"])
    fields = answer.fields
    assert set(fields.pop("allow").split(", ")) - {"HEAD"} == allowed - {"HEAD"}
    assert fields == COMMON | {"content-length": str(len(answer.body))}
