# SPDX-License-Identifier: Apache-2.0
"""Transfers with a token (docs/api.md): refused without it, and nowhere to be read."""

import json
import os
import stat
import subprocess
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

import pytest

from tests.system.controlling import controlled, file_of
from tests.system.harness import Server, free_port, qemu_nbd, wait_until
from tests.system.moving import IMAGECTL, MIB, filled, imagectl
from tests.system.watching import Admin

TOKEN = "s3cr3t-of-the-test"  # noqa: S105
SHOWN = {"Authorization": f"Bearer {TOKEN}"}
REFUSED = (401, "missing or wrong token")


@pytest.fixture(scope="module")
def tcp() -> Admin:
    return Admin(free_port())


@pytest.fixture(scope="module")
def server(workplace: Path, tcp: Admin) -> Iterator[Server]:
    """At level debug, with a control socket and an admin listener."""
    with controlled(workplace, admin_bind=tcp.bind, log_level="debug") as running:
        yield running


@pytest.fixture(scope="module")
def disk(server: Server, workplace: Path) -> Iterator[str]:
    """The URL of a disk that has a token."""
    with qemu_nbd(filled(workplace / "disk.raw", 4 * MIB, (MIB, 2 * MIB))) as sock:
        path = server.add("disk", socket=str(sock), token=TOKEN)
        yield f"http://127.0.0.1:{server.port}{path}"


def test_an_upload_without_the_token_is_refused_before_its_body(server, disk):
    fields = ("Content-Length: 4194304", "Expect: 100-continue")
    head = "".join(f"{line}\r\n" for line in ("PUT /images/disk HTTP/1.1", "Host: x", *fields))
    with server.raw(head.encode() + b"\r\n") as sock, sock.makefile("rb") as stream:
        assert stream.readline() == b"HTTP/1.1 401 Unauthorized\r\n"
        assert b"Connection: close\r\n" in takewhile(b"\r\n".__ne__, stream)
    assert server.request("PUT", "/images/disk", bytes(4 * MIB)).refusal == REFUSED
    assert server.holders() == []
    assert server.request("GET", "/images/disk", headers=SHOWN).status == 200


def test_a_token_is_in_no_answer_log_metric_or_status(server, control, tcp, disk):
    config = file_of(server, "two")
    told = [control.register("guarded", **config, token=TOKEN)]
    told += [control.register("blank", **config, token=f"{TOKEN} x")]
    assert told[1]["message"].startswith('invalid config: "token" must be 1 to 4096')
    server.add("ill", **config, token=[TOKEN])
    answers = [
        server.request(method, f"/images/{name}", headers=headers)
        for name in ("guarded", "disk", "ill")
        for method in ("OPTIONS", "GET", "PUT")
        for headers in ({}, {"Authorization": f"Bearer {TOKEN}x"}, SHOWN)
    ]
    assert [answer.status for answer in answers[:3]] == [401, 401, 200]
    assert answers[-1].status == 404
    told += [control.status("guarded"), control.list()]
    (listed,) = told[-1]["transfers"]
    assert listed["config"]["token"] is True
    wait_until(lambda: tcp.metrics()['refusals_total{reason="unauthorized"}'] >= 12)
    pages = [tcp.ask("/status").body, tcp.ask("/metrics").body]
    registered = list((server.runtime / "registered").iterdir())
    assert {stat.S_IMODE(path.stat().st_mode) for path in registered} == {0o600}
    assert any(TOKEN in path.read_text() for path in registered)

    everything = (server.log, told, pages, [(a.headers.items(), a.body[:999]) for a in answers])
    assert TOKEN not in str(everything)
    assert "must be a string" in server.log


def test_every_command_of_imagectl_shows_the_token(server, disk, home):
    secret = home / "token"
    secret.write_text(f"{TOKEN}\n")
    given = ("--token-file", secret)
    assert "401: missing or wrong token" in imagectl("info", disk, status=3).stderr
    imagectl("map", *given, disk)
    imagectl("check", "--write", *given, disk)
    imagectl("download", *given, "--verify", disk, home / "copy")
    imagectl("upload", *given, "--verify", home / "copy", disk)
    environ = {**os.environ, "IMAGECTL_TOKEN": TOKEN}
    done = subprocess.run([*IMAGECTL, "info", disk], env=environ, check=False, capture_output=True)
    assert done.returncode == 0
    assert TOKEN not in server.log


def test_imagectl_makes_and_lists_transfers_with_a_token(server, home):
    secret = home / "token"
    secret.write_text(TOKEN)
    given = ("--file", server.directory / "one", "--token-file", secret)
    for place, how in (
        (("--control-socket", server.directory / "control"), ("--json",)),
        (("--config-dir", server.config), ()),
    ):
        name = imagectl("transfer", "add", *place, *given).stdout.strip()
        assert server.request("GET", f"/images/{name}").refusal == REFUSED
        assert server.request("GET", f"/images/{name}", headers=SHOWN).body == b"one"
        listed = imagectl("transfer", "list", *how, *place).stdout
        assert TOKEN not in listed
        if how:
            configs = {each["id"]: each["config"] for each in json.loads(listed)["transfers"]}
            assert configs[name]["token"] is True
        else:
            assert "read, write, token" in listed
