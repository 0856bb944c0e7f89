# SPDX-License-Identifier: Apache-2.0
"""imagectl transfer (docs/imagectl.md): add, list and remove, by the socket and as files."""

import json
import re
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.clients import reading
from tests.system.controlling import Control, controlled, file_of
from tests.system.harness import Server
from tests.system.moving import imagectl


@pytest.fixture(scope="module")
def server(workplace: Path) -> Iterator[Server]:
    with controlled(workplace) as running:
        yield running


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
        (("add", "--config-dir", ".", "--nbd", "s", "--raw"), "belongs to --file"),
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
