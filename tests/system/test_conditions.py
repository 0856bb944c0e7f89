# SPDX-License-Identifier: Apache-2.0
"""ETag, Last-Modified and conditions on them: a client never puts two states of a file together."""

import contextlib
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.system.clients import read_answer, reading
from tests.system.harness import ROOT, QemuNbd, Server, repeatable, wait_until

OLD = repeatable("old").randbytes(200_000)
NEW = repeatable("new").randbytes(200_000)
BIG = 16 << 20  # more than the socket buffers of a connection hold
FAILED = (412, "precondition failed")
#: A file that nobody has changed for longer than two seconds.
SETTLED = ROOT / "LICENSE"
SETTLE = 2.2


@pytest.fixture(scope="module")
def settled(server: Server) -> str:
    return server.add("settled", backend="file", file=str(SETTLED), read_only=True)


@pytest.fixture(scope="module")
def images(workplace: Path, server: Server) -> dict[str, Path]:
    """Files with validators, by the ids of their transfers."""
    paths = {name: workplace / name for name in ("curl", "wget", "put", "cut", "kept")}
    for name, path in paths.items():
        path.write_bytes(OLD)
        server.add(name, backend="file", file=str(path))
    with paths["cut"].open("r+b") as file:
        file.truncate(BIG)
    paths["kept"].write_bytes(bytes(BIG))
    time.sleep(SETTLE)
    return paths


def tag_of(server: Server, path: str) -> str:
    tag = server.request("HEAD", path).headers["ETag"]
    assert tag is not None
    return str(tag)


def in_place(path: Path, data: bytes, at: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def test_head_and_get_of_a_file_have_the_same_validators_in_every_worker(server, settled):
    answers = [server.request(method, settled) for method in ("HEAD", "GET") * 4]
    found = {(a.headers["ETag"], a.headers["Last-Modified"]) for a in answers}

    assert len(found) == 1
    ((tag, modified),) = found
    assert tag.startswith('"')
    assert modified == time.strftime(
        "%a, %d %b %Y %H:%M:%S GMT", time.gmtime(SETTLED.stat().st_mtime)
    )
    assert {answer.headers["Cache-Control"] for answer in answers} == {"no-cache"}
    of_304 = {
        "accept-ranges": "bytes",
        "access-control-allow-methods": "GET, PUT, OPTIONS",
        "cache-control": "no-cache",
        "etag": tag,
    }
    for name, value in (("If-None-Match", tag), ("If-Modified-Since", modified)):
        answer = server.request("GET", settled, headers={name: value})
        assert (answer.status, answer.body, answer.fields) == (304, b"", of_304)


def test_a_file_just_changed_and_an_export_have_no_validators(server, workplace, disk):
    fresh = workplace / "fresh"
    fresh.write_bytes(OLD)
    file = server.add("fresh", backend="file", file=str(fresh))
    export = server.add("export", socket=str(disk.socket))
    for path in (file, export):
        answer = server.request("GET", path, headers={"Range": "bytes=0-1"})
        assert (answer.status, answer.headers["ETag"], answer.headers["Last-Modified"]) == (
            *(206, None, None),
        )
        assert answer.headers["Cache-Control"] == "no-store"
        headers = {"Range": "bytes=0-1", "If-Range": '"any"'}
        assert server.request("GET", path, headers=headers).status == 200
        assert server.request("GET", path, headers={"If-Match": '"any"'}).refusal == FAILED
        assert server.request("HEAD", path, headers={"If-None-Match": "*"}).status == 304


@pytest.fixture(scope="module")
def disk(workplace: Path, server: Server):
    image = workplace / "disk.raw"
    image.write_bytes(bytes(1 << 20))
    with QemuNbd(image) as running:
        yield running


def curl(server: Server, path: str, to: Path, *options: str) -> subprocess.CompletedProcess[bytes]:
    command = [
        "curl",
        "-sS",
        "-f",
        "-o",
        str(to),
        *options,
        f"http://127.0.0.1:{server.port}{path}",
    ]
    return subprocess.run(command, capture_output=True, check=False, timeout=30)


def test_curl_resumes_one_state_and_refuses_to_mix_two(server, images, workplace):
    path, part = "/images/curl", workplace / "part"
    tag = tag_of(server, path)
    part.write_bytes(OLD[:1000])
    resume = ("-C", "-", "-H", f"If-Range: {tag}")

    assert curl(server, path, part, *resume).returncode == 0
    assert part.read_bytes() == OLD

    part.write_bytes(OLD[:1000])
    in_place(images["curl"], NEW)
    refused = curl(server, path, part, *resume)
    assert refused.returncode == 33  # CURLE_RANGE_ERROR: the whole file was sent
    assert part.read_bytes() == OLD[:1000]
    assert curl(server, path, part).returncode == 0
    assert part.read_bytes() == NEW


def test_curl_takes_what_it_has_for_as_long_as_that_is_the_image(server, settled, workplace):
    kept, tag = workplace / "copy", workplace / "copy.etag"
    options = ("--etag-save", str(tag), "--etag-compare", str(tag))
    tag.touch()
    assert curl(server, settled, kept, *options).returncode == 0
    assert kept.read_bytes() == SETTLED.read_bytes()
    kept.write_bytes(b"mine")
    assert curl(server, settled, kept, *options).returncode == 0
    assert kept.read_bytes() == b"mine"


def test_wget_fetches_a_file_again_only_if_it_is_another(server, images, workplace):
    home = workplace / "fetched"
    home.mkdir()
    url = f"http://127.0.0.1:{server.port}/images/wget"

    def fetch() -> bytes:
        subprocess.run(["wget", "-N", "-q", url], cwd=home, check=True, timeout=30)
        return (home / "wget").read_bytes()

    assert fetch() == OLD
    assert int((home / "wget").stat().st_mtime) == int(images["wget"].stat().st_mtime)
    before = (home / "wget").stat().st_ctime_ns
    assert (fetch(), (home / "wget").stat().st_ctime_ns) == (OLD, before)
    in_place(images["wget"], NEW)
    assert fetch() == NEW


def test_an_upload_replaces_the_state_that_its_client_has_seen_and_no_other(server, images):
    path, image = "/images/put", images["put"]
    seen = tag_of(server, path)
    head = f"PUT {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(NEW)}\r\n"
    stale = head + 'If-Match: "stale"\r\nExpect: 100-continue\r\n\r\n'
    with server.raw(stale.encode()) as sock, sock.makefile("rb") as stream:
        assert read_answer(stream).refusal == FAILED  # and no 100 before
    assert server.request("PUT", path, NEW, headers={"If-None-Match": "*"}).refusal == FAILED
    assert image.read_bytes() == OLD

    assert server.request("PUT", path, NEW, headers={"If-Match": seen}).status == 200
    assert image.read_bytes() == NEW
    # Who has seen the same state comes too late.
    assert server.request("PUT", path, OLD, headers={"If-Match": seen}).refusal == FAILED
    assert image.read_bytes() == NEW


def test_an_upload_may_be_of_a_new_file_only(server, workplace):
    image = workplace / "new"
    path = server.add("new", backend="file", file=str(image))
    for name, value in (("If-Match", "*"), ("If-Match", '"any"')):
        assert server.request("PUT", path, OLD, headers={name: value}).refusal == FAILED
    assert not image.exists()
    only_new = {"If-None-Match": "*"}
    assert server.request("PUT", path, OLD, headers=only_new).status == 200
    assert server.request("PUT", path, NEW, headers=only_new).refusal == FAILED
    assert image.read_bytes() == OLD


def rest_of(sock: socket.socket) -> bytes:
    """Return what of the body still comes."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    pieces = []
    with contextlib.suppress(ConnectionResetError):
        while sum(map(len, pieces)) < BIG and (piece := sock.recv(1 << 20)):
            pieces.append(piece)
    return b"".join(pieces)


def test_a_file_changed_in_place_while_it_is_read_cuts_the_connection(server, images):
    assert tag_of(server, "/images/cut")
    with reading(server, "/images/cut") as sock:
        in_place(images["cut"], b"new", BIG - 3)
        assert len(rest_of(sock)) < BIG
    wait_until(lambda: "error=ImageChanged" in server.log)


def test_a_file_replaced_while_it_is_read_is_read_as_it_was(server, images, workplace):
    tag = tag_of(server, "/images/kept")
    with reading(server, "/images/kept") as sock:
        (workplace / "next").write_bytes(b"\1" * BIG)
        (workplace / "next").rename(images["kept"])
        assert rest_of(sock) == bytes(BIG)
    rest = {"Range": f"bytes={BIG - 2}-", "If-Range": tag}
    answer = server.request("GET", "/images/kept", headers=rest)
    assert (answer.status, answer.body) == (200, b"\1" * BIG)
