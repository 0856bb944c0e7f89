# SPDX-License-Identifier: Apache-2.0
"""Where a file image may lie: strange targets, directories that refuse, full disks, devices.

Mounts are made in a mount namespace of the server's own, so that none can be left behind;
its files are reached through /proc/PID/root.
"""

import contextlib
import hashlib
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.clients import putting, read_answer
from tests.system.harness import Server, repeatable
from tests.system.skips import needs

OLD = repeatable(3).randbytes(100_000)
NEW = repeatable(4).randbytes(100_000)
NO_ACCESS = (500, "failed to access file")
MIB = 1 << 20


@contextlib.contextmanager
def server_with_mounts(
    workplace: Path, name: str, script: str, *prefix: str
) -> Iterator[tuple[Server, Path]]:
    """Run a server after a script of mounts in ``$1``; yield it and ``$1`` as it sees it."""
    home = workplace / name
    place = home / "place"
    place.mkdir(parents=True)
    server = Server(home, workers=2)
    shell = ["sh", "-ec", f'{script}\nshift; exec "$@"', "sh", str(place)]
    server.command = [
        "unshare",
        "--mount",
        "--propagation=private",
        *shell,
        *prefix,
        *server.command,
    ]
    with server:
        assert server.process is not None
        yield server, Path(f"/proc/{server.process.pid}/root{place}")


@pytest.fixture(scope="module")
def sealed(workplace: Path) -> Iterator[tuple[Server, Path]]:
    """A directory that refuses every change, with a file in it that could be written in place."""
    (workplace / "disk").write_bytes(OLD)
    script = (
        f'mount -t tmpfs tmpfs "$1"; touch "$1/disk"; cat {workplace}/disk > "$1/other"\n'
        f'mount --bind {workplace}/disk "$1/disk"; mount -o remount,ro,bind "$1"\n'
        'test -w "$1/disk"'
    )
    with server_with_mounts(workplace, "sealed", script) as found:
        yield found


@pytest.fixture(scope="module")
def humble(workplace: Path) -> Iterator[tuple[Server, Path]]:
    """A server that may do no more than its user owns, and images that it cannot replace."""
    script = f"""
        mount -t tmpfs -o mode=755 tmpfs "$1"
        for name in mounted foreign; do cat {workplace}/disk > "$1/$name"; done
        mkdir "$1/unlisted" "$1/unwritable" "$1/shared"
        for d in unlisted unwritable shared; do cat {workplace}/disk > "$1/$d/x"; done
        mount --bind {workplace}/disk "$1/mounted"
        chown 12345 "$1/foreign" "$1/shared/x" "$1/shared"
        chmod 300 "$1/unlisted"; chmod 555 "$1/unwritable"; chmod 1777 "$1/shared"
    """
    (workplace / "disk").write_bytes(OLD)
    lost = "-chown,-fowner,-dac_override,-dac_read_search"
    with server_with_mounts(
        workplace, "humble", script, "setpriv", f"--bounding-set={lost}"
    ) as found:
        yield found


@pytest.fixture(scope="module")
def cramped(workplace: Path) -> Iterator[tuple[Server, Path]]:
    """A disk of 4 MiB."""
    script = 'mount -t tmpfs -o size=4m,mode=700 tmpfs "$1"'
    with server_with_mounts(workplace, "cramped", script) as found:
        yield found


def _make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


STRANGE = {
    "directory": Path.mkdir,
    "FIFO": os.mkfifo,
    "socket": _make_socket,
    "character device": lambda path: path.symlink_to("/dev/null"),
    "link to itself": lambda path: path.symlink_to(path),
}
REQUESTS = [("GET", ""), ("HEAD", ""), ("PUT", ""), ("POST", "/flush")]


@pytest.mark.parametrize("kind", STRANGE)
def test_what_is_no_image_is_500_and_stays_as_it_is(server, workplace, kind):
    path = workplace / f"strange {kind}"
    STRANGE[kind](path)
    before = path.lstat()
    url = server.add("strange", backend="file", file=str(path))
    for method, tail in REQUESTS:
        answer = server.request(method, url + tail, NEW if method == "PUT" else None, timeout=5)
        if method == "HEAD":
            assert (answer.status, answer.body) == (500, b"")
        else:
            assert (method, answer.refusal) == (method, NO_ACCESS)
    assert (path.lstat().st_mode, path.lstat().st_ino) == (before.st_mode, before.st_ino)
    assert server.holders() == []


@pytest.mark.parametrize(("method", "tail"), REQUESTS)
@pytest.mark.parametrize("path", ["lacking", "none/x", "file/x"])
def test_a_file_that_lacks_is_500_except_for_put_where_it_can_be_made(
    server, workplace, method, tail, path
):
    (workplace / "file").write_bytes(OLD)
    url = server.add("lacking", backend="file", file=str(workplace / path))
    answer = server.request(method, url + tail, NEW if method == "PUT" else None)
    if (method, path) == ("PUT", "lacking"):
        assert answer.status == 200
        (workplace / path).unlink()
    elif method == "HEAD":
        assert (answer.status, answer.body) == (500, b"")
    else:
        assert answer.refusal == NO_ACCESS


@needs("mounts")
@pytest.mark.parametrize("name", ["disk", "other", "lacking"])
def test_where_the_directory_forbids_replacement_put_is_500_and_never_in_place(sealed, name):
    server, place = sealed
    url = server.add(name, backend="file", file=str(server.directory / "place" / name))
    assert server.request("PUT", url, NEW).refusal == NO_ACCESS
    left = {path.name: path.read_bytes() for path in place.iterdir()}
    assert left == {"disk": OLD, "other": OLD}
    if name != "lacking":
        assert server.request("GET", url).body == OLD


@needs("mounts")
def test_a_raw_file_that_cannot_be_opened_to_write_is_read_only(sealed):
    server, place = sealed
    url = server.add("x", backend="file", file=str(server.directory / "place/other"), format="raw")
    told = server.request("OPTIONS", url)
    assert (told.json["max_writers"], told.headers["Allow"]) == (0, "GET, HEAD, OPTIONS")
    assert server.request("PUT", url, NEW).refusal == (405, "method not allowed")
    zero = b'{"op":"zero","size":5}'
    answer = server.request("PATCH", url, zero, {"Content-Type": "application/json"})
    assert (answer.status, answer.headers["Allow"]) == (405, "GET, HEAD, OPTIONS")
    assert server.request("GET", url).body == (place / "other").read_bytes() == OLD
    assert server.request("POST", f"{url}/flush").status == 200


@needs("mounts")
@pytest.mark.parametrize(
    "name", ["mounted", "foreign", "unlisted/x", "unlisted/new", "unwritable/x", "shared/x"]
)
def test_a_put_that_cannot_succeed_is_refused_before_its_body_and_changes_nothing(humble, name):
    server, place = humble
    url = server.add("x", backend="file", file=str(server.directory / "place" / name))
    before = {p: p.stat().st_ino for p in place.rglob("*")}
    head = f"PUT {url} HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\nExpect: 100-continue\r\n\r\n"
    with server.raw(head.encode()) as sock:
        assert read_answer(sock.makefile("rb")).refusal == NO_ACCESS
    assert {p: p.stat().st_ino for p in place.rglob("*")} == before
    assert name == "unlisted/new" or (place / name).read_bytes() == OLD


@needs("mounts")
@pytest.mark.parametrize("is_there", [True, False], ids=["old file", "no file"])
def test_a_full_disk_is_507_and_the_old_file_stays(cramped, is_there):
    server, place = cramped
    if is_there:
        (place / "x").write_bytes(OLD)
    url = server.add("x", backend="file", file=str(server.directory / "place" / "x"))
    body = repeatable(5).randbytes(6 * MIB)
    answer = server.request("PUT", url, body)
    assert answer.refusal == (507, "no space left")
    left = {path.name: path.read_bytes() for path in place.iterdir()}
    assert left == ({"x": OLD} if is_there else {})
    assert server.holders() == []
    assert server.request("PUT", url, NEW).json == {"ok": True, "bytes_written": len(NEW)}
    (place / "x").unlink()


@needs("mounts")
@pytest.mark.parametrize("way", ["range", "whole"])
def test_a_full_disk_is_507_for_a_raw_file_that_is_sparse(cramped, way):
    server, place = cramped
    with (place / "z").open("wb") as file:
        file.truncate(64 * MIB)
    url = server.add("z", backend="file", file=str(server.directory / "place" / "z"), format="raw")
    length = 64 * MIB if way == "whole" else 6 * MIB
    fields = {} if way == "whole" else {"Content-Range": f"bytes {MIB}-{MIB + length - 1}/*"}
    answer = server.request("PUT", url, repeatable(5).randbytes(length), fields)
    assert answer.refusal == (507, "no space left")
    assert server.holders() == []
    zero = b'{"op":"zero","size":%d}' % (64 * MIB)
    assert server.request("PATCH", url, zero, {"Content-Type": "application/json"}).status == 200
    assert server.request("PUT", url, NEW, {"Content-Range": "bytes 5-*/*"}).status == 200
    assert (place / "z").stat().st_size == 64 * MIB
    assert server.request("GET", url, headers={"Range": "bytes=5-100004"}).body == NEW
    (place / "z").unlink()


@needs("mounts")
def test_a_disk_that_fills_up_is_told_while_the_body_is_still_coming(cramped):
    server, place = cramped
    url = server.add("y", backend="file", file=str(server.directory / "place" / "y"))
    body = repeatable(5).randbytes(6 * MIB)
    with putting(server, url, 64 * MIB, body) as (_, stream):
        assert read_answer(stream).refusal == (507, "no space left")
    assert list(place.iterdir()) == []


@pytest.fixture
def device(workplace: Path) -> Iterator[Path]:
    backing = workplace / "backing"
    backing.write_bytes(OLD[:65536] * 16)
    command = ["losetup", "--find", "--show", str(backing)]
    path = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    yield Path(path)
    subprocess.run(["losetup", "--detach", path], check=True)
    backing.unlink()


@needs("loop devices")
def test_a_block_device_is_read_and_sized_like_a_file(server, device):
    url = server.add("device", backend="file", file=str(device))
    assert server.request("HEAD", url).headers["Content-Length"] == str(MIB)
    assert server.request("GET", url).body == OLD[:65536] * 16
    answer = server.request("GET", url, headers={"Range": f"bytes={MIB - 3}-"})
    assert (answer.status, answer.body) == (206, OLD[65533:65536])


@needs("loop devices")
def test_a_block_device_is_written_in_place(server, device):
    url = server.add("device", backend="file", file=str(device))
    before = device.stat()
    answer = server.request("PUT", url, NEW[:65537])
    assert answer.json == {"ok": True, "bytes_written": 65537}
    assert server.request("POST", f"{url}/flush").json == {"ok": True}
    assert server.request("GET", url).body == NEW[:65537] + (OLD[:65536] * 16)[65537:]
    assert (device.stat().st_mode, device.stat().st_ino) == (before.st_mode, before.st_ino)


@needs("loop devices")
def test_zeros_written_to_a_block_device_overwrite_what_was_there(server, device):
    url = server.add("device", backend="file", file=str(device))
    assert server.request("PUT", url, bytes(MIB)).status == 200
    assert server.request("GET", url).body == bytes(MIB)


@needs("loop devices")
def test_a_body_larger_than_the_block_device_is_400_before_a_byte_is_asked_for(server, device):
    url = server.add("device", backend="file", file=str(device))
    head = f"PUT {url} HTTP/1.1\r\nHost: x\r\nContent-Length: {MIB + 1}\r\nExpect: 100-continue\r\n"
    with server.raw(head.encode() + b"\r\n") as sock:
        answer = read_answer(sock.makefile("rb"))
    status, message = answer.refusal
    assert status == 400
    assert str(MIB) in message
    assert str(MIB + 1) in message
    assert server.request("GET", url).body == OLD[:65536] * 16


@needs("loop devices")
def test_a_block_device_is_a_disk_as_a_raw_file_is(server, device):
    url = server.add("device", backend="file", file=str(device), format="raw")
    old = bytearray(OLD[:65536] * 16)
    whole = [{"start": 0, "length": MIB, "zero": False}]
    assert server.request("GET", f"{url}/extents").json == whole
    assert server.request("PUT", url, NEW, {"Content-Range": "bytes 77777-*/*"}).status == 200
    old[77777:177777] = NEW
    zero = b'{"op":"zero","offset":100001,"size":30000,"flush":true}'
    assert server.request("PATCH", url, zero, {"Content-Type": "application/json"}).status == 200
    old[100001:130001] = bytes(30000)
    assert server.request("GET", url).body == old
    expected = {"algorithm": "whole-sha256", "checksum": hashlib.sha256(old).hexdigest()}
    assert server.request("GET", f"{url}/checksum?algorithm=whole-sha256").json == expected
    end = {"Content-Range": f"bytes {MIB - 1}-{MIB}/*"}
    assert server.request("PUT", url, b"ab", end).status == 416
    assert server.request("PUT", url, NEW).status == 400
    assert device.is_block_device()


def test_file_roots_are_compared_with_links_resolved(workplace):
    home = workplace / "rooted"
    root = home / "root"
    root.mkdir(parents=True)
    outside = home / "outside"
    outside.write_bytes(OLD)
    (root / "inside").write_bytes(OLD)
    (root / "link").symlink_to(outside)
    (home / "root-alike").write_bytes(OLD)
    with Server(home, workers=2, file_roots=root) as server:
        found = {}
        for name in ("root/inside", "root/link", "root/../outside", "root-alike", "root/new"):
            url = server.add("x", backend="file", file=str(home / name))
            found[name] = [
                server.request("GET", url).status,
                server.request("PUT", url, NEW).status,
            ]
    assert found == {
        "root/inside": [200, 200],
        "root/link": [500, 500],
        "root/../outside": [500, 500],
        "root-alike": [500, 500],
        "root/new": [500, 200],
    }
    assert outside.read_bytes() == OLD
