# SPDX-License-Identifier: Apache-2.0
"""Transfer files (docs/api.md): what makes an id known, and what is said of one that is not."""

import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.system.harness import Answer, Server, nbdkit
from tests.system.skips import needs

UNKNOWN = (404, {"error": "unknown image_id"})
SETTLED = 3  # seconds after which a file may be cached


@pytest.fixture(scope="module")
def sockets(workplace: Path) -> Iterator[dict[str, str]]:
    """Servers of images that tell who they are."""
    with (
        nbdkit(workplace / "one.sock", "data", "raw=one") as one,
        nbdkit(workplace / "two.sock", "data", "raw=two") as two,
    ):
        yield {"one": str(one), "two": str(two)}


def get(server: Server, name: str) -> Answer:
    return server.request("GET", f"/images/{name}")


def write(server: Server, name: str, text: bytes) -> Path:
    """Write a transfer file, safe as the server wants it."""
    path = server.config / name
    path.write_bytes(text)
    path.chmod(0o600)
    return path


def lines(server: Server, name: str) -> list[str]:
    """Return what the log says of a transfer's file, its quotes as they were before quoting."""
    path = str(server.config / name)
    log = server.log.replace('\\"', '"')
    return [line for line in log.splitlines() if path in line.split("path=")[-1].split()]


def age(path: Path, seconds: float = SETTLED) -> None:
    """Make a file old enough to be cached."""
    then = path.stat().st_mtime_ns - int(seconds * 1e9)
    os.utime(path, ns=(then, then))


def ask_every_worker(server: Server, name: str) -> set[bytes]:
    return {get(server, name).body for _ in range(10 * server.workers)}


# Files that make an id known


@pytest.mark.parametrize(
    "fields",
    [
        {"backend": "nbd"},
        {"backend": "NBD"},
        {"backend": "Nbd"},
        {"backend": None},
        {"export": None, "export_bitmap": None, "read_only": None},
        {"export": "", "export_bitmap": ""},
        {"read_only": False},
        {"read_only": True},
        {"unknown": {"a": [1]}, "file": 5, "size": "x"},
    ],
    ids=str,
)
def test_a_usable_file_makes_its_id_known(
    server: Server, sockets: dict[str, str], fields: dict[str, object]
):
    server.add("usable", socket=sockets["one"], **fields)
    before = len(lines(server, "usable"))
    assert (get(server, "usable").status, get(server, "usable").body) == (200, b"one")
    told = lines(server, "usable")[before:]
    assert len(told) == ("unknown" in fields)  # which fields were ignored, once
    assert not told or 'unknown field "unknown", field "file" is of backend "file"' in told[0]


def test_blanks_around_paths_are_stripped(server: Server, sockets: dict[str, str], tmp_path: Path):
    server.add("blanks", socket=f" \t{sockets['one']}\n ")
    assert get(server, "blanks").body == b"one"
    (tmp_path / "image").write_bytes(b"of a file")
    server.add("blanks-file", backend="FILE", file=f"  {tmp_path / 'image'}\t")
    assert get(server, "blanks-file").body == b"of a file"


def test_an_nbd_transfer_does_not_look_at_the_file_field(
    server: Server, sockets: dict[str, str], tmp_path: Path
):
    server.add("both", socket=sockets["one"], file=str(tmp_path))
    assert get(server, "both").body == b"one"


@pytest.mark.parametrize(
    "name", ["a", ".hidden", "..a", "a.json", "white space", "-x", "*a", "\u00fc\u00df", "x" * 255]
)
def test_any_single_path_component_is_an_id(server: Server, sockets: dict[str, str], name: str):
    write(server, name, json.dumps({"socket": sockets["one"]}).encode())
    quoted = "".join(f"%{byte:02x}" for byte in name.encode())
    assert get(server, quoted).body == b"one"


def test_a_file_may_have_64_kib_and_not_a_byte_more(server: Server, sockets: dict[str, str]):
    text = json.dumps({"socket": sockets["one"]}).encode()
    write(server, "largest", text.ljust(64 * 1024))
    assert get(server, "largest").body == b"one"
    write(server, "larger", text.ljust(64 * 1024 + 1))
    assert (get(server, "larger").status, get(server, "larger").json) == UNKNOWN
    assert lines(server, "larger") != []


# Files that change


@pytest.mark.parametrize("aged", [False, True], ids=["fresh", "cached"])
def test_a_changed_file_takes_effect_on_the_next_request(
    server: Server, sockets: dict[str, str], aged: bool
):
    for who in ["one", "two"] * 3:
        path = write(server, "changing", json.dumps({"socket": sockets[who]}).encode())
        if aged:
            age(path)
        assert ask_every_worker(server, "changing") == {who.encode()}


def test_a_fresh_file_changed_in_place_is_not_taken_from_the_cache(
    server: Server, sockets: dict[str, str]
):
    """The same inode, size and mtime: as two writes within one tick of the clock leave it."""
    path = write(server, "tick", json.dumps({"socket": sockets["one"]}).encode())
    then = path.stat().st_mtime_ns
    assert ask_every_worker(server, "tick") == {b"one"}
    path.write_bytes(json.dumps({"socket": sockets["two"]}).encode())
    os.utime(path, ns=(then, then))
    assert ask_every_worker(server, "tick") == {b"two"}


@pytest.mark.parametrize("aged", [False, True], ids=["fresh", "cached"])
def test_a_deleted_file_makes_its_id_unknown_at_once(
    server: Server, sockets: dict[str, str], aged: bool
):
    path = write(server, "deleted", json.dumps({"socket": sockets["one"]}).encode())
    if aged:
        age(path)
    assert ask_every_worker(server, "deleted") == {b"one"}
    path.unlink()
    assert ask_every_worker(server, "deleted") == {b'{"error":"unknown image_id"}'}


def test_a_broken_file_that_is_mended_is_known_at_once(server: Server, sockets: dict[str, str]):
    write(server, "mended", b"{")
    assert (get(server, "mended").status, get(server, "mended").json) == UNKNOWN
    write(server, "mended", json.dumps({"socket": sockets["one"]}).encode())
    assert get(server, "mended").body == b"one"


def test_a_cached_file_that_others_may_write_from_now_on_counts_no_more(
    server: Server, sockets: dict[str, str]
):
    path = write(server, "opened", json.dumps({"socket": sockets["one"]}).encode())
    age(path)
    assert ask_every_worker(server, "opened") == {b"one"}
    path.chmod(0o622)
    assert ask_every_worker(server, "opened") == {b'{"error":"unknown image_id"}'}


# Files that do not count

SOCKET = {"socket": "/nowhere"}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, "socket"),
        ({"backend": "nbd"}, "socket"),
        *(({"socket": value}, "socket") for value in (None, "", "  ", 5, True, [], {}, ["/a"])),
        ({"socket": "/a\0b"}, "socket"),
        ({"socket": "/" + "x" * 200}, "socket"),
        *((SOCKET | {"export": value}, "export") for value in (5, True, [], {})),
        *((SOCKET | {"export_bitmap": value}, "export_bitmap") for value in (5, False, [], {})),
        *((SOCKET | {"read_only": value}, "read_only") for value in ("true", 0, 1, [], "")),
        *((SOCKET | {"backend": value}, "backend") for value in ("ceph", "", 5, ["nbd"], True)),
        ({"backend": "file"}, "file"),
        *(({"backend": "file", "file": v}, "file") for v in (None, "", " \t", 5, False, [])),
        ({"backend": "file", "file": "/a\0b"}, "file"),
        ({"backend": "file", "file": "/a", "read_only": "no"}, "read_only"),
        ({"backend": "file", "socket": "/a"}, "file"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else "",
)
def test_a_wrong_field_makes_the_id_unknown_and_is_named_in_the_log(
    server: Server, request: pytest.FixtureRequest, fields: dict[str, object], named: str
):
    name = f"wrong-{abs(hash(request.node.name))}"
    write(server, name, json.dumps(fields).encode())
    for method in ("GET", "OPTIONS", "PUT"):
        answer = server.request(method, f"/images/{name}")
        assert (answer.status, answer.json) == UNKNOWN
    assert lines(server, name) != []
    assert all(f'"{named}"' in line for line in lines(server, name))


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"not json", b"[]", b"null", b'"nbd"', b"5", b"\xff\xfe\xfd", b"[" * 60000, b"\0"],
    ids=lambda text: repr(text[:10]),
)
def test_what_is_no_json_object_makes_the_id_unknown_and_is_logged(
    server: Server, request: pytest.FixtureRequest, text: bytes
):
    name = f"text-{abs(hash(request.node.name))}"
    write(server, name, text)
    assert (get(server, name).status, get(server, name).json) == UNKNOWN
    assert lines(server, name) != []
    assert all("JSON" in line for line in lines(server, name))


def as_symlink(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def as_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


def as_directory(path: Path) -> None:
    path.unlink()
    path.mkdir(0o700)


def as_socket(path: Path) -> None:
    path.unlink()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


def as_anybodys(path: Path) -> None:
    os.chown(path, 12345, -1)


@pytest.mark.parametrize(
    "change",
    [
        as_symlink,
        as_fifo,
        as_directory,
        as_socket,
        lambda path: path.chmod(0o620),
        lambda path: path.chmod(0o602),
        pytest.param(as_anybodys, marks=needs("owners")),
    ],
    ids=["symlink", "fifo", "directory", "socket", "group_writable", "world_writable", "owner"],
)
def test_a_file_that_others_could_have_made_does_not_count(
    server: Server,
    request: pytest.FixtureRequest,
    sockets: dict[str, str],
    change: Callable[[Path], None],
):
    name = f"file-{request.node.callspec.id}"
    change(write(server, name, json.dumps({"socket": sockets["one"]}).encode()))
    answer = server.request("GET", f"/images/{name}", timeout=5)
    assert (answer.status, answer.json) == UNKNOWN
    assert lines(server, name) != []


def test_a_missing_file_is_not_worth_a_warning(server: Server):
    assert (get(server, "never-was").status, get(server, "never-was").json) == UNKNOWN
    assert "WARNING" not in "".join(lines(server, "never-was"))


# What is logged


def test_an_unusable_file_is_logged_once_for_each_change_whoever_meets_it(server: Server):
    for change, text in enumerate((b"{", b"[]", b'{"socket":5}', b"{"), start=1):
        write(server, "logged", text)
        ask_every_worker(server, "logged")
        assert len(lines(server, "logged")) == change


def test_no_answer_says_where_files_are(server: Server):
    write(server, "secret", b'{"socket":5}')
    answer = get(server, "secret")
    assert str(server.config) not in str(answer.headers) + answer.body.decode()


def test_a_config_directory_that_others_may_write_counts_no_more(
    server: Server, sockets: dict[str, str]
):
    server.add("inside", socket=sockets["one"])
    assert get(server, "inside").body == b"one"
    server.config.chmod(0o770)
    try:
        assert (get(server, "inside").status, get(server, "inside").json) == UNKNOWN
    finally:
        server.config.chmod(0o700)
    assert get(server, "inside").body == b"one"
    assert str(server.config) in server.log
