# SPDX-License-Identifier: Apache-2.0
"""What must be so before a start, as far as no real server is needed to see it."""

import errno
import os
import re
import socket
import tempfile
from pathlib import Path

import pytest

from imageserver.process import Process
from imageserver.runtime.pathclaim import PathClaim
from imageserver.server import addresses, preconditions, startup
from imageserver.server.preconditions import CannotStart, check, check_reload
from imageserver.server.startup import read_settings
from tests.unit.masters import prepared
from tests.unit.processes import holding

_USE = """
import sys
from imageserver.runtime.directory import RuntimeDirectory
from imageserver.runtime.slottable import SharedTable
runtime = RuntimeDirectory(sys.argv[1])
runtime.prepare()
SharedTable(runtime, {}).open()
print("held", flush=True)
sys.stdin.readline()
"""


pytestmark = pytest.mark.usefixtures("place")


def test_heartbeats_are_in_memory() -> None:
    assert preconditions.heartbeat_directory() == "/dev/shm"  # noqa: S108


def test_heartbeats_go_elsewhere_where_memory_takes_no_files(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preconditions, "_HEARTBEATS", str(place / "missing"))

    assert preconditions.heartbeat_directory() is None
    check(read_settings())


def test_without_a_place_for_heartbeats_there_is_no_start(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preconditions, "_HEARTBEATS", str(place / "missing"))
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(place / "none"))

    said = r"/missing nor in .*/none \(No such file .*TMPDIR"
    with pytest.raises(CannotStart, match=said):
        check(read_settings())
    with pytest.raises(CannotStart, match=said):
        check_reload(Process(read_settings()))


def test_a_limit_per_image_that_the_total_is_below_is_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("IMAGESERVER_MAX_READERS_PER_IMAGE", "8")
    assert check(read_settings()) == []
    monkeypatch.setenv("IMAGESERVER_MAX_WRITERS_PER_IMAGE", "4")

    assert check(read_settings()) == [
        "IMAGESERVER_MAX_WRITERS_PER_IMAGE=4 has no effect: IMAGESERVER_MAX_WRITERS=1 is less"
    ]


@pytest.mark.parametrize(("threads", "is_enough"), [("4", False), ("5", True)])
def test_threads_that_transfers_can_take_all_of_are_a_warning(
    threads: str, is_enough: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMAGESERVER_WORKERS", "2")
    monkeypatch.setenv("IMAGESERVER_THREADS", threads)
    monkeypatch.setenv("IMAGESERVER_MAX_READERS", "7")

    said = (
        "IMAGESERVER_WORKERS x IMAGESERVER_THREADS = 8 is not more than IMAGESERVER_MAX_READERS + "
        "IMAGESERVER_MAX_WRITERS = 8: while all of these run, other clients get 503 server busy"
    )
    assert check(read_settings()) == ([] if is_enough else [said])


@pytest.mark.parametrize("below", ["", "/registered"])
def test_a_config_directory_is_not_in_the_runtime_directory(
    place: Path, monkeypatch: pytest.MonkeyPatch, below: str
) -> None:
    """A start would remove the transfer files there."""
    (place / "transfers/registered").mkdir(mode=0o700)
    (place / "transfers").chmod(0o700)
    (place / "link").symlink_to("transfers")
    monkeypatch.setenv("IMAGESERVER_CONFIG_DIR", f"{place}/link{below}")
    monkeypatch.setenv("IMAGESERVER_RUNTIME_DIR", f"{place}/transfers")

    with pytest.raises(CannotStart, match=f"link{below} is in IMAGESERVER_RUNTIME_DIR=.*choose an"):
        check(read_settings())


def test_a_kernel_that_tells_nothing_of_sockets_is_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody asks until a worker has died; from then on, writes would fail."""

    def refused() -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(preconditions, "require_sock_diag", refused)
    (warning,) = check(read_settings())
    assert "sock_diag(7): Operation not permitted" in warning
    assert "AF_NETLINK" in warning


def test_a_proc_that_is_not_ours_is_no_place_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preconditions, "is_proc_ours", lambda: False)

    with pytest.raises(CannotStart, match="/proc is missing, or that of another PID namespace"):
        check(read_settings())


def test_a_socket_that_is_there_already_need_not_be_made(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As systemd's are, in directories where the server's user may make none."""
    monkeypatch.setenv("IMAGESERVER_BIND", f"unix:{place}/missing/socket")
    with pytest.raises(CannotStart, match="missing is no directory where this user can make"):
        check(read_settings())
    monkeypatch.setattr(addresses, "_is_socket", lambda _: True)

    assert check(read_settings()) == []


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("nosuchhost.invalid:1", ".*"),
        ("192.0.2.1:54323", "Cannot assign requested address"),
        ("[2001:db8::1]:0", ".*"),
    ],
)
def test_an_address_that_this_host_has_not_is_refused(
    address: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMAGESERVER_BIND", address)

    said = (
        rf"^IMAGESERVER_BIND: {re.escape(address)} cannot be used \({why}\); "
        r"choose an address of this host, as 'ip address' lists them\.$"
    )
    with pytest.raises(CannotStart, match=said):
        check(read_settings())

    monkeypatch.setenv("LISTEN_FDS", "1")  # systemd has bound it, and need not have that address
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    assert check(read_settings()) == []


def test_a_port_that_a_running_server_has_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as running:
        monkeypatch.setenv("IMAGESERVER_BIND", f"127.0.0.1:{running.getsockname()[1]}")

        assert check(read_settings()) == []


def test_a_slash_at_the_end_of_a_directory_does_not_count(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "real").mkdir(0o700)
    monkeypatch.setenv("IMAGESERVER_RUNTIME_DIR", f"{place}/run/")
    check(read_settings())
    prepared()
    (place / "link").symlink_to("real")
    monkeypatch.setenv("IMAGESERVER_RUNTIME_DIR", f"{place}/link/")

    with pytest.raises(CannotStart, match="link is not a directory that belongs to uid"):
        check(read_settings())


def test_a_path_that_others_have_lost_is_refused_at_the_check_and_at_the_start(
    place: Path,
) -> None:
    others = PathClaim(str(place / "run"))
    others.take()
    said = rf"lost {place}/run .* stop pid {os.getpid()}\.$"

    with pytest.raises(CannotStart, match=said):
        check(read_settings())
    with pytest.raises(SystemExit, match=said):
        startup.take_over(Process(read_settings()))
    others.close()


def test_beside_a_server_that_has_its_directory_another_one_may_start(place: Path) -> None:
    others = PathClaim(str(place / "run"))
    others.take()
    with holding(_USE, place / "run"):
        check(read_settings())
        startup.take_over(Process(read_settings()))
    others.close()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        (
            "control_socket",
            "run",
            "IMAGESERVER_CONTROL_SOCKET: .*/run is IMAGESERVER_RUNTIME_DIR's",
        ),
        ("bind", "unix:run/slots", "IMAGESERVER_BIND: .*/slots is IMAGESERVER_RUNTIME_DIR's"),
        ("tls_cert", "fifo", "IMAGESERVER_TLS_CERT=.*fifo cannot be read .no regular file"),
    ],
)
def test_what_cannot_be_used_is_refused_by_the_check(
    place: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    os.mkfifo(place / "fifo")
    prefix, _, path = value.rpartition(":")
    monkeypatch.setenv(
        f"IMAGESERVER_{name.upper()}", f"{prefix}{':' if prefix else ''}{place}/{path}"
    )

    with pytest.raises(CannotStart, match=said):
        check(read_settings())


def test_file_roots_that_are_not_there_are_a_warning(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMAGESERVER_FILE_ROOTS", f"{place},{place}/none")

    told = f"IMAGESERVER_FILE_ROOTS: {place}/none is no directory: no file in it is served"
    assert check(read_settings()) == [told]


@pytest.mark.parametrize(("apart", "is_refused"), [("0\n", True), ("1\n", False)])
def test_any_address_of_ipv6_includes_those_of_ipv4(
    place: Path, monkeypatch: pytest.MonkeyPatch, apart: str, is_refused: bool
) -> None:
    (place / "bindv6only").write_text(apart)
    monkeypatch.setattr(addresses, "_BINDV6ONLY", str(place / "bindv6only"))
    some, others = {("::", "80")}, {("192.0.2.1", "80")}

    assert addresses._overlap(some, others) == addresses._overlap(others, some) == is_refused


def test_a_port_that_only_root_may_bind_is_refused_by_the_check(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class _Unprivileged(socket.socket):
        def bind(self, address: tuple[str, int]) -> None:  # type: ignore[override]
            if 0 < address[1] < 1024:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            super().bind(address)

    monkeypatch.setattr(socket, "socket", _Unprivileged)
    monkeypatch.setenv("IMAGESERVER_BIND", "127.0.0.1:80")

    with pytest.raises(CannotStart, match=r"80 cannot be used .*choose a port above 1023"):
        check(read_settings())
