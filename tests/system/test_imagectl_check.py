# SPDX-License-Identifier: Apache-2.0
"""imagectl check (docs/imagectl.md): our server holds all, others differ, and liars are told."""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab.ovirt import ovirt_daemon

from tests.system.clients import reading
from tests.system.disks import offered
from tests.system.harness import Server, free_port, qemu_nbd
from tests.system.looking import fragmented, mixed, url_of
from tests.system.moving import MIB, filled, imagectl
from tests.system.pki import files

SETTINGS = {"max_writers": 2}


@pytest.fixture(params=["nbd", "raw"])
def image(request: pytest.FixtureRequest, server: Server, home: Path, name: str) -> Iterator[str]:
    """The URL of 8 MiB: 1 of data, 1 of changed data, 1 that was zeroed since, 5 of zeros.

    Or, of a raw file without NBD server, of 3 of data and 5 of zeros.
    """
    if request.param == "nbd":
        with mixed(server, home) as url:
            yield url
    else:
        disk = filled(home / "disk.raw", 8 * MIB, (0, 3 * MIB))
        with offered(server, "raw", name, disk) as path:
            yield f"http://127.0.0.1:{server.port}{path}"


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


def test_what_a_file_lacks_is_missing_and_no_failure(server, name, home):
    (home / "two").write_bytes(b"two")
    server.add(name, backend="file", file=str(home / "two"))
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
