# SPDX-License-Identifier: Apache-2.0
"""qcow2 files by curl alone: backups that restore, downloads that resume, who is kept out."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.clients import reading
from tests.system.disks import offered
from tests.system.harness import Server, nbdkit, program, qemu_img, qemu_nbd, repeatable, wait_until
from tests.system.moving import filled, imagectl, offer

KIB, MIB = 1 << 10, 1 << 20
SIZE = 24 * MIB
SETTINGS = {"MAX_READERS": 16}
QCOW2 = "?format=qcow2"
#: What curl says where an answer to a range is the whole file.
NOT_RESUMED = 33


def curl(*arguments: object, status: int = 0) -> str:
    command = [program("curl"), "-sS", "--fail", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == status, (command, done.stderr)
    return done.stdout


def write(server: Server, path: str, expected: bytearray, at: int, data: bytes) -> None:
    """Write to an image and to what it is expected to be."""
    last = at + len(data) - 1
    answer = server.request("PATCH", path, data, {"Range": f"bytes={at}-{last}"})
    assert answer.status == 200, answer.body
    expected[at : last + 1] = data


def zero(server: Server, path: str, expected: bytearray, at: int, length: int) -> None:
    body = b'{"op":"zero","offset":%d,"size":%d}' % (at, length)
    answer = server.request("PATCH", path, body, {"Content-Type": "application/json"})
    assert answer.status == 200, answer.body
    expected[at : at + length] = bytes(length)


def test_a_full_backup_and_five_incrementals_by_curl_restore_each_state(
    server: Server, home: Path
) -> None:
    image, expected = home / "vm.qcow2", bytearray(SIZE)
    qemu_img("create", "-q", "-f", "qcow2", image, SIZE)
    for point in range(6):
        path, query, bitmap, options = "/images/vm", QCOW2, {}, ()
        if point:
            bitmap, options = {"export_bitmap": f"b{point - 1}"}, ("-B", f"b{point - 1}")
            query += f"&context=dirty&backing={point - 1}.qcow2&backing_format=qcow2"
        with qemu_nbd(image, *options, fmt="qcow2") as sock:
            server.add("vm", socket=str(sock), **bitmap)
            new = repeatable(f"point {point}").randbytes(100_000)
            write(server, path, expected, point * MIB + 700, new)
            write(server, path, expected, SIZE - 70_000, new[:70_000])
            if point:
                zero(server, path, expected, (point - 1) * MIB + 700, 80_000)
            url = f"http://127.0.0.1:{server.port}{path}{query}"
            curl("-o", home / f"{point}.qcow2", url)
        qemu_img("bitmap", "--add", "--granularity", "64k", image, f"b{point}")
        (home / f"{point}.raw").write_bytes(expected)

    target = home / "target.raw"
    target.write_bytes(bytes(SIZE))
    with qemu_nbd(target) as sock:
        url = offer(server, sock)
        for point in range(6):
            backup, restored = home / f"{point}.qcow2", home / "restored.raw"
            qemu_img("check", backup)
            qemu_img("convert", "-O", "raw", backup, restored)
            imagectl("upload", "--format", "qcow2", "--backing", backup, url)
            state = (home / f"{point}.raw").read_bytes()
            assert restored.read_bytes() == target.read_bytes() == state
            assert backup.stat().st_size < MIB, "only what had changed was sent"


@pytest.fixture(scope="module", params=["nbd", "raw"])
def disk(request: pytest.FixtureRequest, server: Server, workplace: Path) -> Iterator[str]:
    """The path of a disk with data at three places."""
    spans = (0, 4 * MIB), (9 * MIB + 5, 9 * MIB + 70_000), (SIZE - 3 * MIB, SIZE - 2 * MIB)
    image = filled(workplace / "disk.raw", SIZE, *spans)
    # Else QEMU 11 writes the zeros, and no extent changes.
    with offered(server, request.param, "disk", image, "--discard=unmap") as path:
        yield path


@pytest.fixture
def url(server: Server, disk: str) -> str:
    return f"http://127.0.0.1:{server.port}{disk}{QCOW2}"


def cut_off(url: str, part: Path) -> None:
    """Begin a download that ends after a part."""
    command = f"{program('curl')} -s '{url}' | head -c 1234567 > {part}"
    subprocess.run(["bash", "-c", command], check=True, timeout=60)
    assert part.stat().st_size == 1234567


def tag_of(server: Server, path: str) -> str:
    """Return the ETag of a qcow2 file; that of a raw one has none just after a change."""
    return wait_until(lambda: server.request("HEAD", path).headers["ETag"] or "")


def test_a_download_that_was_cut_off_is_resumed(server: Server, home: Path, url: str) -> None:
    cut_off(url, home / "part")
    wait_until(lambda: not server.holders())
    etag = tag_of(server, url.partition(str(server.port))[2])
    curl("-C", "-", "-H", f"If-Range: {etag}", "-o", home / "part", url)
    curl("-o", home / "whole", url)

    assert (home / "part").read_bytes() == (home / "whole").read_bytes()
    qemu_img("check", "-f", "qcow2", home / "part")


def test_a_download_is_not_resumed_where_the_extents_have_changed(
    server: Server, home: Path, url: str, disk: str
) -> None:
    cut_off(url, home / "part")
    begun = (home / "part").read_bytes()
    etag = tag_of(server, disk + QCOW2)
    wait_until(lambda: not server.holders())
    zero(server, disk, bytearray(SIZE), 2 * MIB, MIB)

    resume = "-C", "-", "-H", f"If-Range: {etag}", "-o", home / "part", url
    curl(*resume, status=NOT_RESUMED)
    assert (home / "part").read_bytes() == begun
    curl("-o", home / "part", url)
    qemu_img("compare", "-F", "qcow2", home.parent / "disk.raw", home / "part", "-f", "raw", "-U")


def test_several_connections_each_fetch_a_range_at_once(
    server: Server, home: Path, url: str
) -> None:
    curl("-o", home / "whole", url)
    size = (home / "whole").stat().st_size
    cuts = [size * n // 4 for n in range(5)]
    ranges: list[object] = ["-Z"]
    for n in range(4):
        ranges += ["-r", f"{cuts[n]}-{cuts[n + 1] - 1}", "-o", home / f"{n}", url, "--next"]
    curl(*ranges[:-1])

    together = b"".join((home / f"{n}").read_bytes() for n in range(4))
    assert together == (home / "whole").read_bytes()


def test_imagectl_takes_the_file_that_the_server_makes(
    server: Server, home: Path, url: str
) -> None:
    """... as it is: neither libnbd nor QEMU's programs are needed."""
    said = imagectl("download", "--format", "qcow2", url.partition("?")[0], home / "copy.qcow2")
    curl("-o", home / "whole", url)

    assert said.stderr == "The server makes the qcow2 file.\n"
    assert (home / "copy.qcow2").read_bytes() == (home / "whole").read_bytes()
    assert not list(home.glob("copy*.part*"))
    again = ("--force", "--verify", "--json")
    said = imagectl("download", *again, "--format", "qcow2", url.partition("?")[0], home / "whole")
    assert json.loads(said.stdout)["verified_by"] == "checksum"


def test_streams_share_an_image_which_nobody_else_has_meanwhile(server: Server, home: Path) -> None:
    with nbdkit(home / "nbd", "pattern", "64M") as sock:
        path = server.add("pattern", socket=str(sock))
        with reading(server, path + QCOW2):
            assert server.holders() == ["READ pattern"]
            assert server.request("GET", path + QCOW2, headers={"Range": "bytes=0-3"}).status == 206
            assert server.request("HEAD", path + QCOW2).status == 200
            assert server.request("GET", path, headers={"Range": "bytes=0-3"}).status == 206
            for method, other in (("GET", "/extents"), ("GET", "/checksum"), ("POST", "/flush")):
                assert server.request(method, path + other).refusal == (409, "image busy")
            patch = {"Range": "bytes=0-3"}
            assert server.request("PATCH", path, b"data", patch).refusal == (409, "image busy")
        wait_until(lambda: not server.holders())
        assert server.request("GET", path + "/extents").status == 200
