# SPDX-License-Identifier: Apache-2.0
"""curl, wget, requests and httpx, as their users call them."""

import hashlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import requests

from tests.system.harness import Server, program, qemu_nbd, repeatable
from tests.system.pki import TlsServer, make_pki

SIZE = 4 << 20
PART = 100_000
OLD = repeatable("old").randbytes(SIZE)
NEW = repeatable("new").randbytes(SIZE)
IMAGES = ("nbd", "file")


@pytest.fixture(scope="module")
def served(workplace: Path) -> Iterator[TlsServer]:
    """A server on TCP with TLS and on a Unix socket, plain."""
    server = TlsServer(workplace, make_pki(workplace / "pki"), max_writers=2)
    server.env["IMAGESERVER_BIND"] += f",unix:{workplace}/http.sock"
    with server:
        yield server


@pytest.fixture(scope="module")
def server(workplace: Path) -> Iterator[Server]:
    home = workplace / "plain"
    home.mkdir()
    with Server(home) as running:
        yield running


@pytest.fixture(scope="module")
def raw_nbd(workplace: Path) -> Iterator[Path]:
    (workplace / "nbd").write_bytes(OLD)
    with qemu_nbd(workplace / "nbd") as sock:
        yield sock


@pytest.fixture(params=IMAGES)
def disk(request: pytest.FixtureRequest, workplace: Path, raw_nbd: Path) -> Path:
    """The file behind /images/{nbd,file}, with the old bytes in it; its name is the image's."""
    disk = workplace / request.param
    disk.write_bytes(OLD)
    return disk


def add(server: Server, disk: Path) -> str:
    fields = {
        "nbd": {"socket": str(disk.with_name("nbd.sock"))},
        "file": {"backend": "file", "file": str(disk)},
    }
    return server.add(disk.name, **fields[disk.name])


@pytest.fixture
def url(server: Server, disk: Path) -> str:
    return f"http://127.0.0.1:{server.port}{add(server, disk)}"


def run(*command: object) -> str:
    """Run a program that must succeed; return what it prints."""
    words = [program(str(command[0])), *map(str, command[1:])]
    done = subprocess.run(words, capture_output=True, check=False, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return done.stdout


def curl(*arguments: object) -> str:
    return run("curl", "--disable", "--fail", "--silent", "--show-error", *arguments)


def written(size: int) -> str:
    return f'{{"ok":true,"bytes_written":{size}}}'


# curl


def test_curl_uploads_a_file(url, disk, tmp_path):
    (tmp_path / "new").write_bytes(NEW)
    assert curl("-T", tmp_path / "new", url) == written(SIZE)
    assert disk.read_bytes() == NEW


def test_curl_cannot_upload_what_has_no_length(url, disk):
    """From a pipe, curl sends chunks: it is told, and nothing is changed."""
    command = [program("curl"), "--disable", "-sS", "-T", "-", url]
    done = subprocess.run(command, input=NEW, capture_output=True, check=True, timeout=30)
    assert done.stdout == b'{"error":"Content-Length required"}'
    assert disk.read_bytes() == OLD


@pytest.mark.parametrize("begun", [0, 1, PART, SIZE - 1], ids=str)
def test_curl_resumes_a_download(url, disk, tmp_path, begun):
    (tmp_path / "copy").write_bytes(OLD[:begun])
    curl("-C", "-", "-o", tmp_path / "copy", url)
    assert (tmp_path / "copy").read_bytes() == OLD


def test_curl_takes_a_416_for_the_end_of_what_is_complete(url, disk, tmp_path):
    """Without --fail: with it, curl 7.88 reports 416 as an error, from any server."""
    (tmp_path / "copy").write_bytes(OLD)
    run("curl", "--disable", "-sS", "-C", "-", "-o", tmp_path / "copy", url)
    assert (tmp_path / "copy").read_bytes() == OLD


@pytest.mark.parametrize(
    ("wanted", "first", "last"),
    [("0-99", 0, 100), (f"{PART}-", PART, SIZE), ("-512", SIZE - 512, SIZE)],
)
def test_curl_reads_a_range(url, disk, tmp_path, wanted, first, last):
    status = curl("--range", wanted, "-o", tmp_path / "part", "-w", "%{http_code}", url)
    assert status == "206"
    assert (tmp_path / "part").read_bytes() == OLD[first:last]


@pytest.mark.parametrize("disk", ["nbd"], indirect=True)
def test_curl_writes_zeroes_and_flushes_a_part(url, disk, tmp_path):
    (tmp_path / "part").write_bytes(NEW[:PART])
    binary = ("-H", "Content-Type: application/octet-stream", "--data-binary", f"@{tmp_path}/part")
    patch = ("-X", "PATCH", "-H", f"Range: bytes=1000-{1000 + PART - 1}")
    assert curl(*patch, *binary, url) == written(PART)
    zero = '{"op":"zero","offset":1000,"size":512}'
    assert curl("-X", "PATCH", "--json", zero, url) == '{"ok":true}'
    assert curl("-X", "PATCH", "--json", '{"op":"flush"}', url) == '{"ok":true}'
    expected = OLD[:1000] + bytes(512) + NEW[512:PART] + OLD[1000 + PART :]
    assert disk.read_bytes() == expected


@pytest.mark.parametrize("disk", ["nbd"], indirect=True)
def test_curl_uploads_a_part(url, disk, tmp_path):
    """As docs/clients.md has it; older curls do the same by ``-C``, which newer ones refuse."""
    (tmp_path / "rest").write_bytes(NEW[PART:])
    field = f"Content-Range: bytes {PART}-{SIZE - 1}/{SIZE}"
    assert curl("-H", field, "-T", tmp_path / "rest", url) == written(SIZE - PART)
    assert disk.read_bytes() == OLD[:PART] + NEW[PART:]


def test_curl_uses_the_unix_socket_that_options_names(served, disk, tmp_path):
    path = add(served, disk)
    socket = served.directory / "http.sock"
    options = curl("--unix-socket", socket, "-X", "OPTIONS", f"http://localhost{path}")
    assert f'"unix_socket":"{socket}"' in options
    curl("--unix-socket", socket, "-o", tmp_path / "copy", f"http://localhost{path}")
    assert (tmp_path / "copy").read_bytes() == OLD


def test_curl_trusts_the_given_ca_and_no_other(served, disk, tmp_path):
    (tmp_path / "new").write_bytes(NEW)
    url = f"https://localhost:{served.port}{add(served, disk)}"
    trust = ("--cacert", served.directory / "pki" / "ca.crt")
    assert curl(*trust, "-T", tmp_path / "new", url) == written(SIZE)
    curl(*trust, "-C", "-", "-o", tmp_path / "copy", url)
    assert (tmp_path / "copy").read_bytes() == NEW
    command = [program("curl"), "--disable", "-s", url]
    stranger = subprocess.run(command, check=False, capture_output=True, timeout=30)
    assert stranger.returncode == 60  # the certificate cannot be authenticated


# wget


@pytest.mark.parametrize("begun", [0, PART, SIZE], ids=str)
def test_wget_continues_a_download(url, disk, tmp_path, begun):
    (tmp_path / "copy").write_bytes(OLD[:begun])
    run("wget", "--no-config", "-q", "-c", "-O", tmp_path / "copy", url)
    assert (tmp_path / "copy").read_bytes() == OLD


def test_wget_trusts_the_given_ca(served, disk, tmp_path):
    url = f"https://localhost:{served.port}{add(served, disk)}"
    trust = f"--ca-certificate={served.directory}/pki/ca.crt"
    run("wget", "--no-config", "-q", trust, "-O", tmp_path / "copy", url)
    assert (tmp_path / "copy").read_bytes() == OLD


# Python libraries


def pieces(data: bytes, size: int = 65536) -> Iterator[bytes]:
    return (data[at : at + size] for at in range(0, len(data), size))


def test_requests_streams_both_ways_on_one_connection(url, disk, tmp_path):
    (tmp_path / "new").write_bytes(NEW)
    digest = hashlib.sha256()
    with requests.Session() as session, (tmp_path / "new").open("rb") as source:
        session.trust_env = False
        answer = session.put(url, data=source, timeout=30)
        assert (answer.status_code, answer.text) == (200, written(SIZE))
        with session.get(url, stream=True, timeout=30) as download:
            for piece in download.iter_content(65536):
                digest.update(piece)
        part = session.get(url, headers={"Range": "bytes=10-19"}, timeout=30)
    assert digest.digest() == hashlib.sha256(NEW).digest()
    assert (part.status_code, part.content) == (206, NEW[10:20])
    assert disk.read_bytes() == NEW


def test_requests_trusts_the_given_ca(served, disk):
    url = f"https://localhost:{served.port}{add(served, disk)}"
    ca = str(served.directory / "pki" / "ca.crt")
    assert requests.get(url, verify=ca, timeout=30).content == OLD
    with pytest.raises(requests.exceptions.SSLError):
        requests.get(url, timeout=30)


def test_httpx_streams_both_ways_on_one_connection(url, disk):
    digest = hashlib.sha256()
    with httpx.Client(trust_env=False, timeout=30) as client:
        length = {"Content-Length": str(SIZE)}
        answer = client.put(url, content=pieces(NEW), headers=length)
        assert (answer.status_code, answer.text) == (200, written(SIZE))
        with client.stream("GET", url) as download:
            for piece in download.iter_bytes():
                digest.update(piece)
    assert digest.digest() == hashlib.sha256(NEW).digest()
    assert disk.read_bytes() == NEW


def test_httpx_hears_a_refusal_while_it_sends(url, disk):
    """Without a length, httpx sends chunks: it is told, and nothing is changed."""
    with httpx.Client(trust_env=False, timeout=30) as client:
        answer = client.put(url, content=pieces(NEW))
    assert (answer.status_code, answer.json()) == (400, {"error": "Content-Length required"})
    assert disk.read_bytes() == OLD


def test_httpx_uses_the_unix_socket_and_tls(served, disk):
    path = add(served, disk)
    transport = httpx.HTTPTransport(uds=str(served.directory / "http.sock"))
    with httpx.Client(transport=transport, timeout=30) as client:
        assert client.get(f"http://localhost{path}").content == OLD
    with httpx.Client(verify=served.context, trust_env=False, timeout=30) as client:
        assert client.get(f"https://localhost:{served.port}{path}").content == OLD
