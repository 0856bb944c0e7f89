# SPDX-License-Identifier: Apache-2.0
"""A locale without UTF-8 changes nothing: ids and paths are UTF-8, names on disk any bytes."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.system.controlling import Control
from tests.system.harness import ROOT, Server, qemu_nbd, repeatable, wait_until

OLD = repeatable("old").randbytes(65536)
NEW = repeatable("new").randbytes(65536)
ID = "Größe-\u65e5"


@pytest.fixture(scope="module", params=["C, without UTF-8 mode", "the tests' own"])
def server(request: pytest.FixtureRequest, workplace: Path) -> Iterator[Server]:
    """A server in a place whose name is not ASCII; with a locale that knows ASCII only."""
    home = workplace / f"plätze-{request.param_index}"
    home.mkdir()
    roots = home / "bilder-\u65e5"
    roots.mkdir()
    with pytest.MonkeyPatch.context() as environ:
        if request.param_index == 0:
            environ.setenv("LC_ALL", "C")
            environ.setenv("PYTHONUTF8", "0")
            environ.setenv("PYTHONCOERCECLOCALE", "0")
        server = Server(
            home,
            file_roots=f"{roots},{home}",
            control_socket=home / "steuer-ü",
            workers=2,
        )
        server.env["IMAGESERVER_BIND"] += f",unix:{home}/horch-ü"
        with server:
            yield server
    shutil.rmtree(os.fsencode(home))


def _add(server: Server, **fields: object) -> str:
    server.add(ID, **fields)
    return f"/images/{quote(ID)}"


def _moves_bytes(server: Server, url: str) -> None:
    assert server.request("GET", url).body == OLD
    assert server.request("PUT", url, NEW).json == {"ok": True, "bytes_written": len(NEW)}
    assert server.request("GET", url).body == NEW


def test_a_path_in_utf_8_leads_to_that_file(server: Server) -> None:
    image = server.directory / "bilder-\u65e5" / "bild-ü"
    image.write_bytes(OLD)
    url = _add(server, backend="file", file=str(image))
    _moves_bytes(server, url)
    assert server.request("POST", f"{url}/flush").json == {"ok": True}
    assert image.read_bytes() == NEW


def test_an_image_whose_real_path_is_not_utf_8_is_one_like_any_other(server: Server) -> None:
    real = os.fsencode(server.directory / "bilder-\u65e5") + b"/\xff\xe4"
    Path(os.fsdecode(real)).write_bytes(OLD)
    link = server.directory / "link-ü"
    link.unlink(missing_ok=True)
    os.symlink(real, os.fsencode(link))
    url = _add(server, backend="file", file=str(link))
    _moves_bytes(server, url)
    assert server.request("POST", f"{url}/flush").json == {"ok": True}
    assert Path(os.fsdecode(real)).read_bytes() == NEW


def test_sockets_and_exports_are_utf_8(server: Server) -> None:
    image = server.directory / "disk"
    image.write_bytes(OLD)
    with qemu_nbd(image, export="ä", sock=server.directory / "nbd-ü") as path:
        url = _add(server, backend="nbd", socket=str(path), export="ä")
        _moves_bytes(server, url)
        assert server.request("GET", f"{url}/extents").status == 200


def test_what_is_registered_has_an_id_in_utf_8(server: Server) -> None:
    control = Control(server.directory / "steuer-ü")
    config = {"backend": "file", "file": str(server.directory / "eins")}
    (server.directory / "eins").write_bytes(b"one")
    assert control.register("ü-registered", **config)["status"] == "ok"
    assert server.request("GET", f"/images/{quote('ü-registered')}").body == b"one"
    assert control.status("ü-registered")["status"] == "ok"
    assert control.unregister("ü-registered")["status"] == "ok"


def test_the_log_is_utf_8_and_names_bytes_that_are_not(server: Server) -> None:
    temporary = server.config / ".new"
    temporary.write_text("{")
    temporary.chmod(0o600)
    temporary.rename(server.config / "kaputt-ü")
    assert server.request("GET", f"/images/{quote('kaputt-ü')}").status == 404
    told = f'path={json.dumps(str(server.config / "kaputt-ü"))} problem="not valid JSON'
    wait_until(lambda: told in server.log)

    missing = server.directory / "link-missing"
    missing.unlink(missing_ok=True)
    os.symlink(os.fsencode(server.directory) + b"/none\xff", os.fsencode(missing))
    url = _add(server, backend="file", file=str(missing))
    assert server.request("GET", url).status == 500
    wait_until(lambda: r"/none\\xff: No such file" in server.log)


def test_options_names_the_socket_in_utf_8(server: Server) -> None:
    assert (
        server.request("OPTIONS", "/images/*").json["unix_socket"] == f"{server.directory}/horch-ü"
    )
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(server.directory / "horch-ü"))


def test_the_settings_are_shown_as_the_bytes_they_are() -> None:
    environ = {b"PYTHONIOENCODING": b"utf-8:strict", b"IMAGESERVER_TLS_CERT": b"/\xff\xc3\xbc"}
    command = [sys.executable, "-m", "imageserver", "--show-config"]
    shown = subprocess.run(command, cwd=ROOT, env=environ, check=True, capture_output=True).stdout
    assert b"IMAGESERVER_TLS_CERT=/\xff\xc3\xbc\n" in shown
