# SPDX-License-Identifier: Apache-2.0
"""QEMU's curl driver and nbdkit's curl plugin: images read over HTTP as if they were here."""

import contextlib
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from tests.system.harness import (
    Server,
    nbdkit,
    program,
    qemu_img,
    qemu_io,
    qemu_nbd,
    repeatable,
    wait_until,
)
from tests.system.pki import TlsServer, make_pki

T = TypeVar("T")
M = 1 << 20
SIZE = 16 * M
#: QEMU 7.2's curl driver loses a wake-up when requests overlap, and hangs: with nginx, too.
ONE_AT_A_TIME = ("-m", "1")
#: As in docs/clients.md: newer nbdkits make more requests at once than there are slots.
NBDKIT = ("--readonly", "--threads=1", "curl")


def retried(act: Callable[[], T]) -> T:
    """Do what must end within seconds: QEMU 10 hangs in one of four tries, with any server."""
    for _ in range(6):
        with contextlib.suppress(subprocess.TimeoutExpired):
            return act()
    pytest.fail("QEMU hung each time")


@pytest.fixture(scope="module")
def image(workplace: Path) -> Path:
    """A qcow2 image with data, zeros and holes; ``.raw`` beside it has the same content."""
    image, seed = workplace / "image.qcow2", workplace / "seed"
    seed.write_bytes(repeatable("seed").randbytes(4 * M))
    qemu_img("create", "-q", "-f", "qcow2", image, SIZE)
    qemu_io(
        image, "qcow2", f"write -s {seed} 1M 4M", "write -z 2M 1M", f"write -P 9 {SIZE - 512} 512"
    )
    qemu_img("convert", "-f", "qcow2", "-O", "raw", image, image.with_suffix(".raw"))
    return image


@pytest.fixture(scope="module")
def url(server: Server, image: Path) -> Iterator[str]:
    """Where /images/{qcow2,raw,nbd} are: two files, and the qcow2 as an NBD export."""
    with qemu_nbd(image, "--read-only", fmt="qcow2") as sock:
        server.add("qcow2", backend="file", file=str(image), read_only=True)
        server.add("raw", backend="file", file=str(image.with_suffix(".raw")), read_only=True)
        server.add("nbd", socket=str(sock))
        yield f"http://127.0.0.1:{server.port}/images"


@pytest.mark.parametrize(
    ("name", "fmt"), [("nbd", "raw"), ("raw", "raw"), ("qcow2", "qcow2")], ids=str
)
def test_qemu_img_info_knows_format_and_size(url, name, fmt):
    info = json.loads(qemu_img("info", "--output=json", f"{url}/{name}"))
    assert (info["format"], info["virtual-size"]) == (fmt, SIZE)


@pytest.mark.parametrize("name", ["nbd", "raw", "qcow2"])
def test_qemu_img_compare_finds_no_difference(url, image, name):
    fmt = "qcow2" if name == "qcow2" else "raw"
    compare = ("compare", "-f", "qcow2", "-F", fmt, image, f"{url}/{name}")
    assert retried(lambda: qemu_img(*compare, timeout=8)).strip() == "Images are identical."


@pytest.mark.parametrize("to", ["raw", "qcow2"])
@pytest.mark.parametrize("name", ["nbd", "raw", "qcow2"])
def test_qemu_img_convert_copies_the_image(server, url, image, tmp_path, name, to):
    fmt = "qcow2" if name == "qcow2" else "raw"
    formats = ("-f", fmt, "-O", to)
    convert = ("convert", *ONE_AT_A_TIME, *formats, f"{url}/{name}", tmp_path / "copy")
    retried(lambda: qemu_img(*convert, timeout=8))
    said = qemu_img("compare", "-f", "qcow2", "-F", to, image, tmp_path / "copy")
    assert said.strip() == "Images are identical."
    assert wait_until(lambda: server.holders() == [])


def test_qemu_takes_options_for_the_connection(url, image):
    options = {"driver": "http", "url": f"{url}/qcow2", "readahead": 1 << 20, "timeout": 30}
    uri = "json:" + json.dumps({"driver": "qcow2", "file": options})
    compare = ("compare", "-f", "qcow2", image, uri)
    assert retried(lambda: qemu_img(*compare, timeout=8)).strip() == "Images are identical."


def test_a_qcow2_file_is_a_backing_file_over_http(url, image, tmp_path):
    """Reads of what the overlay lacks come through the server; writes stay here."""
    overlay, expected = tmp_path / "overlay.qcow2", tmp_path / "expected.qcow2"
    changes = ("write -P 7 512k 1M", "write -z 6M 64k", "write -P 8 3M 4k")
    expected.write_bytes(image.read_bytes())
    qemu_io(expected, "qcow2", *changes)

    def change_overlay() -> None:
        backing = ("-b", f"{url}/qcow2", "-F", "qcow2")
        qemu_img("create", "-q", "-f", "qcow2", *backing, overlay, timeout=8)
        qemu_io(overlay, "qcow2", *changes, timeout=8)

    retried(change_overlay)
    mapped = retried(lambda: qemu_img("map", "--output=json", overlay, timeout=8))
    (depth,) = {extent["depth"] for extent in json.loads(mapped)} - {0, 2}
    assert depth == 1
    compare = ("compare", "-f", "qcow2", "-F", "qcow2", expected, overlay)
    assert retried(lambda: qemu_img(*compare, timeout=8)).strip() == "Images are identical."


def test_qemu_reads_over_tls_with_the_servers_certificate(image, workplace):
    home = workplace / "tls"
    home.mkdir()
    with TlsServer(home, make_pki(workplace / "pki")) as server:
        server.add("raw", backend="file", file=str(image.with_suffix(".raw")))
        uri = f"https://localhost:{server.port}/images/raw"
        options = {"driver": "https", "url": uri, "sslverify": False}
        node = "json:" + json.dumps({"driver": "raw", "file": options})
        assert json.loads(qemu_img("info", "--output=json", node))["virtual-size"] == SIZE
        said = qemu_img("compare", "-f", "qcow2", image, node)
        assert said.strip() == "Images are identical."
        with pytest.raises(subprocess.CalledProcessError):  # our CA is none of the system's
            qemu_img("info", uri)


@pytest.mark.parametrize("name", ["nbd", "raw"])
def test_nbdkits_curl_plugin_reads_the_image_back(server, url, image, tmp_path, workplace, name):
    copy = tmp_path / "copy"
    with nbdkit(workplace / "curl.sock", *NBDKIT, f"{url}/{name}") as sock:
        command = [program("nbdcopy"), f"nbd+unix:///?socket={sock}", str(copy)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    assert copy.read_bytes() == image.with_suffix(".raw").read_bytes()
    assert wait_until(lambda: server.holders() == [])


def test_nbdkits_curl_plugin_reads_over_tls_and_the_unix_socket(image, tmp_path, workplace):
    home, pki = workplace / "tls-nbd", make_pki(workplace / "pki")
    home.mkdir()
    server = TlsServer(home, pki)
    server.env["IMAGESERVER_BIND"] += f",unix:{home}/http.sock"
    ways = {
        "tls": (f"https://localhost:{server.port}/images/raw", f"cainfo={pki}/ca.crt"),
        "unix": ("http://localhost/images/raw", f"unix-socket-path={home}/http.sock"),
    }
    with server:
        server.add("raw", backend="file", file=str(image.with_suffix(".raw")))
        for name, arguments in ways.items():
            with nbdkit(workplace / f"{name}.sock", *NBDKIT, *arguments) as sock:
                command = [program("nbdcopy"), f"nbd+unix:///?socket={sock}", tmp_path / name]
                subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
            assert (tmp_path / name).read_bytes() == image.with_suffix(".raw").read_bytes()
