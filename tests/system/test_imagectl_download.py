# SPDX-License-Identifier: Apache-2.0
"""imagectl download: the same bytes and the same holes, once, again, and after an interruption."""

import fcntl
import json
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from imageserver.client.moving import resume
from imageserver.client.plan import Spans
from tests.system.disks import offered
from tests.system.harness import Server, nbdkit, qemu_img, qemu_io, qemu_nbd, wait_until
from tests.system.moving import (
    IMAGES,
    KIB,
    MIB,
    assert_same,
    data,
    filled,
    finish,
    imagectl,
    offer,
    offer_file,
    running,
    taken,
)

SETTINGS = {"max_readers": 4}


@pytest.mark.parametrize(
    ("what", "kind"), [*((what, "nbd") for what in IMAGES), ("sparse", "raw"), ("sectors", "raw")]
)
def test_a_disk_arrives_as_it_is(server: Server, home: Path, name: str, what: str, kind: str):
    image = IMAGES[what](home / "disk.raw")
    with offered(server, kind, name, image, "--read-only") as path:
        url = f"http://127.0.0.1:{server.port}{path}"
        imagectl("download", url, home / "copy.raw", "--verify")
    assert_same(image, home / "copy.raw")


@pytest.mark.parametrize("connections", [1, 4])
def test_a_file_arrives_with_its_holes(server: Server, home: Path, connections: int):
    image = filled(home / "disk.raw", 40 * MIB, (0, MIB), (20 * MIB + 4 * KIB, 24 * MIB))
    options = ("--connections", connections, "--verify")
    imagectl("download", offer_file(server, image), home / "copy.raw", *options)
    assert_same(image, home / "copy.raw")


@pytest.mark.parametrize("size", [0, 1, 1_000_003])
def test_a_file_of_any_size_arrives(server: Server, home: Path, size: int):
    image = filled(home / "disk.raw", size, (size // 2, size))
    imagectl("download", offer_file(server, image), home / "copy.raw")
    assert_same(image, home / "copy.raw")


def test_an_image_becomes_qcow2(server: Server, home: Path):
    image, copy = IMAGES["clusters"](home / "disk.raw"), home / "copy.qcow2"
    with qemu_nbd(image, "--read-only") as sock:
        imagectl("download", offer(server, sock), copy, "--format", "qcow2", "--verify")
    qemu_img("check", "-q", copy)
    back = home / "back.raw"
    qemu_img("convert", "-f", "qcow2", "-O", "raw", copy, back)
    assert_same(image, back)


@pytest.fixture
def changed(server: Server, home: Path) -> Iterator[tuple[str, Path, Path]]:
    """The URL of a disk with a bitmap, its file, and what it was when the bitmap was made."""
    disk, old = home / "disk.qcow2", home / "old.raw"
    qemu_img("create", "-q", "-f", "qcow2", disk, "64M")
    qemu_io(disk, "qcow2", "write -q -P 1 0 8M", "write -q -P 2 32M 4M")
    qemu_img("convert", "-f", "qcow2", "-O", "raw", disk, old)
    qemu_img("bitmap", "--add", disk, "b0")
    qemu_io(disk, "qcow2", "write -q -P 3 1M 64k", "write -q -z 33M 1M", "write -q -P 4 60M 64k")
    with qemu_nbd(disk, "--read-only", "--bitmap=b0", fmt="qcow2") as sock:
        path = server.add(home.name, socket=str(sock), export_bitmap="b0")
        yield f"http://127.0.0.1:{server.port}{path}", disk, old


def test_only_changes_are_fetched_into_an_older_copy(changed: tuple[str, Path, Path]):
    url, disk, old = changed
    done = json.loads(imagectl("download", url, old, "--incremental", "--json", "--verify").stdout)
    assert done["moved"] == 2 * 64 * KIB
    assert "identical" in qemu_img("compare", "-U", "-f", "qcow2", "-F", "raw", disk, old)
    assert (33 * MIB, 34 * MIB) not in data(old)
    assert taken(old) < 12 * MIB


def test_changes_become_an_overlay_of_an_older_copy(changed: tuple[str, Path, Path], home: Path):
    url, disk, old = changed
    before, overlay = old.read_bytes(), home / "overlay.qcow2"
    imagectl("download", url, overlay, "--incremental", "--base", old)
    assert "identical" in qemu_img("compare", "-U", "-f", "qcow2", "-F", "qcow2", disk, overlay)
    assert old.read_bytes() == before
    assert taken(overlay) < 2 * MIB


def test_changes_do_not_go_into_another_disk(changed: tuple[str, Path, Path], home: Path):
    other = filled(home / "other.raw", MIB, (0, MIB))
    before = other.read_bytes()
    refused = imagectl("download", changed[0], other, "--incremental", status=5)
    assert refused.stderr == (
        f"imagectl: {other} has 1048576 bytes, the image 67108864: it is no earlier state of it\n"
    )
    assert other.read_bytes() == before


@pytest.mark.parametrize("form", ["raw", "qcow2"])
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_download_goes_on(server: Server, home: Path, stop: int, form: str):
    size, copy = 32 * MIB, home / "copy"
    image, rate = filled(home / "disk.raw", size, (0, size)), home / "rate"
    part = copy.with_suffix(".part")
    limits = (
        "--filter=rate",
        "file",
        str(image),
        f"rate={16 * 8 * MIB}",
        f"rate-file={rate}",
        "burstiness=0.1",
    )
    with nbdkit(home / "slow.sock", *limits) as sock:
        command = ("download", offer(server, sock), copy, "--format", form)
        with running(*command) as moving:
            wait_until(lambda: taken(part) >= 4 * MIB, 30)
            moving.send_signal(stop)
            assert finish(moving, 130).endswith(
                f"imagectl: interrupted: the same command goes on with {part} where it stopped.\n"
            )
        assert sorted(home.glob("copy*")) == [part, copy.with_suffix(".part.state")]
        rate.write_text(str(8 * 10_000 * MIB))
        again = json.loads(imagectl(*command, "--json", "--verify").stdout)
    assert again["resumed"] >= MIB
    assert again["resumed"] + again["moved"] == again["data"] >= again["size"] == size
    assert "identical" in qemu_img("compare", "-f", "raw", "-F", form, image, copy)
    assert list(home.glob("copy*")) == [copy]


def test_another_image_is_not_gone_on_with(server: Server, home: Path):
    image, copy = filled(home / "disk.raw", 8 * MIB, (0, MIB)), home / "copy.raw"
    filled(home / "copy.raw.part", 8 * MIB, (4 * MIB, 5 * MIB))
    with qemu_nbd(image, "--read-only") as sock:
        url = offer(server, sock)
        other = resume.identity(8 * MIB, "raw full", urlsplit(url).path, Spans([(0, 8 * MIB)]))
        resume.State(f"{copy}.part.state").save(other, [(0, 8 * MIB)])
        said = imagectl("download", url, copy).stderr
    assert said == "The image is not the one that was being downloaded: starting again.\n"
    assert_same(image, copy)


def test_a_busy_server_is_asked_again(server: Server, home: Path):
    image = filled(home / "disk.raw", 32 * MIB, (0, 32 * MIB))
    url, copy = offer_file(server, image), home / "copy.raw"
    head = f"GET {url.partition(str(server.port))[2]} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    readers = [server.raw(head) for _ in range(4)]  # that take all slots, and do not read
    try:
        for reader in readers:
            reader.recv(1)
        refused = imagectl("download", url, copy, "--patience", 0, status=1).stderr
        assert refused.endswith("answered GET with 503: too many parallel reads\n")
        with running("download", url, copy) as moving:
            wait_until(lambda: server.log.count("status=503") > 1)
            for reader in readers:
                reader.shutdown(socket.SHUT_RDWR)
                reader.close()
            finish(moving)
    finally:
        for reader in readers:
            reader.close()
    assert_same(image, copy)


def test_two_downloads_do_not_share_a_file(server: Server, home: Path):
    image, copy = filled(home / "disk.raw", MIB, (0, MIB)), home / "copy.raw"
    url = offer_file(server, image)
    with (home / "copy.raw.part").open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        refused = imagectl("download", url, copy, status=5).stderr
    assert refused == f"imagectl: {copy}.part: another download of this file is running\n"
    imagectl("download", url, copy)
    assert_same(image, copy)


def test_what_is_there_stays_unless_forced(server: Server, home: Path):
    image, copy = filled(home / "disk.raw", MIB, (0, MIB)), home / "copy.raw"
    copy.write_text("mine")
    url = offer_file(server, image)
    refused = imagectl("download", url, copy, status=5).stderr
    assert refused == f"imagectl: {copy} exists: --force replaces it\n"
    assert copy.read_text() == "mine"
    imagectl("download", url, copy, "--force")
    assert_same(image, copy)


def test_each_refusal_is_a_sentence_and_a_status(server: Server, home: Path):
    copy, host = home / "copy", f"127.0.0.1:{server.port}"
    with socket.socket() as closed:  # bound, but nobody listens
        closed.bind(("127.0.0.1", 0))
        nobody = f"127.0.0.1:{closed.getsockname()[1]}"
        cases = {
            f"http://{host}/images/none": (
                3,
                f"{host} answered OPTIONS with 404: unknown image_id",
            ),
            f"http://{nobody}/images/x": (1, f"cannot connect to {nobody}: Connection refused"),
            "ftp://x/y": (2, "'ftp://x/y' is no http:// or https:// URL"),
        }
        for url, (status, sentence) in cases.items():
            assert (
                imagectl("download", url, copy, status=status).stderr == f"imagectl: {sentence}\n"
            )
    gone = f"http://{host}{server.add('gone', socket=str(home / 'gone.sock'))}"
    assert imagectl("download", gone, copy, "--patience", 0, status=1).stderr.count("\n") == 1
    assert imagectl("download", gone, copy, "--base", home, status=2).stdout == ""
    assert not list(home.glob("copy*"))


def test_a_traceback_is_shown_on_demand_only(server: Server, home: Path):
    url = f"http://127.0.0.1:{server.port}/images/none"
    assert "Traceback" in imagectl("download", url, home / "x", "--debug", status=3).stderr


def test_tls_and_unix_sockets_are_ways_to_the_server(workplace: Path, home: Path, pki: Path):
    image = filled(home / "disk.raw", 3 * MIB, (MIB, 2 * MIB))
    sock = home / "http.sock"
    place = home / "server"
    place.mkdir(mode=0o700)
    tls = {"tls_cert": pki / "server.crt", "tls_key": pki / "server.key"}
    with Server(place, workers=1, **tls) as server:
        server.stop()
        server.env["IMAGESERVER_BIND"] += f",unix:{sock}"
        server.start()
        path = server.add("disk", backend="file", file=str(image))
        url = f"https://127.0.0.1:{server.port}{path}"
        imagectl("download", url, home / "tls.raw", "--cacert", pki / "ca.crt")
        refused = imagectl("download", url, home / "no.raw", status=1).stderr
        assert refused.startswith(f"imagectl: no TLS with 127.0.0.1:{server.port}: ")
        plain = f"http://127.0.0.1:{server.port}{path}"
        refused = imagectl("info", plain, "--patience", "0", status=1).stderr
        assert refused.endswith(" (does this port speak TLS? then say https://)\n")
        imagectl("download", f"{url}?format=qcow2", home / "no.raw", status=2)
        imagectl("download", plain, home / "no.raw", "--cacert", pki / "ca.crt", status=2)
        imagectl("download", f"http://x{path}", home / "unix.raw", "--unix-socket", sock)
    assert_same(image, home / "tls.raw")
    assert_same(image, home / "unix.raw")
