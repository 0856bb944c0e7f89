# SPDX-License-Identifier: Apache-2.0
"""What conf/haproxy.cfg lets through to a host: the same bytes, bounded, by name, and once."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.balancing import Balancer, recording, two_hosts
from tests.system.clients import putting, read_answer
from tests.system.harness import Server, qemu_img, qemu_io, qemu_nbd, repeatable, wait_until

MIB = 1 << 20
CHANGED = range(3 * MIB, 4 * MIB)


@pytest.fixture(scope="module")
def servers(workplace: Path) -> Iterator[list[Server]]:
    with two_hosts(workplace, "image-0") as running:
        yield running


@pytest.fixture(scope="module")
def mapped(workplace: Path, servers: list[Server]) -> Iterator[Balancer]:
    """``image-0`` is on the second host; what else is mapped, a fixture says."""
    ports = [server.port for server in servers]
    text = "image-0 kvm2\n"
    with Balancer(workplace / "mapped", *ports, routing="map", map_text=text) as running:
        yield running


@pytest.fixture(scope="module")
def disk(workplace: Path, servers: list[Server], mapped: Balancer) -> Iterator[bytearray]:
    """The content of ``disk``, an NBD image on the first host; ``file`` is a file there."""
    content = bytearray(8 * MIB)
    content[: 2 * MIB] = repeatable("disk").randbytes(2 * MIB)
    (workplace / "disk.raw").write_bytes(content)
    image = workplace / "disk.qcow2"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", workplace / "disk.raw", image)
    qemu_img("bitmap", "--add", "-f", "qcow2", image, "b0")
    qemu_io(image, "qcow2", f"write -P 7 {CHANGED.start} {len(CHANGED)}")
    content[CHANGED.start : CHANGED.stop] = b"\7" * len(CHANGED)
    with qemu_nbd(image, "--bitmap=b0", fmt="qcow2", export="e") as sock:
        servers[0].add("disk", socket=str(sock), export="e", export_bitmap="b0")
        servers[0].add("file", backend="file", file=str(workplace / "file"))
        mapped.route("disk", "kvm1")
        mapped.route("file", "kvm1")
        yield content


#: What is asked for, of the host itself and through haproxy.
QUESTIONS: dict[str, tuple[str, str, dict[str, str]]] = {
    "whole": ("GET", "/images/disk", {}),
    "range": ("GET", "/images/disk", {"Range": "bytes=1000000-3000000"}),
    "unsatisfiable": ("GET", "/images/disk", {"Range": f"bytes={8 * MIB}-"}),
    "extents": ("GET", "/images/disk/extents", {}),
    "dirty extents": ("GET", "/images/disk/extents?context=dirty", {}),
    "span of extents": ("GET", "/images/disk/extents?start=65536&length=3000000", {}),
    "head": ("HEAD", "/images/disk", {}),
    "options": ("OPTIONS", "/images/disk", {}),
    "415": ("PATCH", "/images/disk", {}),
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_an_answer_is_the_same_as_without_haproxy(disk, mapped, servers, name):
    method, path, headers = QUESTIONS[name]
    headers = headers | {"X-Request-Id": "the-same"}
    direct = servers[0].request(method, path, headers=headers)
    through = mapped.request(method, path, headers=headers)
    assert (through.status, through.body) == (direct.status, direct.body)
    assert through.fields == direct.fields
    assert {a.headers["X-Request-Id"] for a in (through, direct)} == {"the-same"}
    if name == "whole":
        assert through.body == disk


def test_what_is_written_through_haproxy_is_what_was_sent(disk, mapped, servers):
    new = repeatable("new").randbytes(8 * MIB)
    answer = mapped.request("PUT", "/images/disk", new)
    assert (answer.status, answer.json) == (200, {"ok": True, "bytes_written": 8 * MIB})
    part = repeatable("part").randbytes(MIB + 1)
    span = {"Range": f"bytes=4097-{4097 + MIB}"}
    assert mapped.request("PATCH", "/images/disk", part, span).status == 200
    zero = b'{"op":"zero","offset":5000000,"size":1000000,"flush":true}'
    json_type = {"Content-Type": "application/json"}
    assert mapped.request("PATCH", "/images/disk", zero, json_type).status == 200
    span = {"Content-Range": f"bytes {7 * MIB}-{7 * MIB + 9}/*"}
    assert mapped.request("PUT", "/images/disk?flush=y", b"0123456789", span).json["flushed"]
    assert mapped.request("POST", "/images/disk/flush").status == 200
    disk[:] = new
    disk[4097 : 4097 + MIB + 1] = part
    disk[5000000:6000000] = bytes(1000000)
    disk[7 * MIB : 7 * MIB + 10] = b"0123456789"
    assert servers[0].request("GET", "/images/disk").body == disk
    assert mapped.request("PUT", "/images/file", new).status == 200
    assert mapped.request("GET", "/images/file").body == new


def expecting(balancer: Balancer, path: str, length: int) -> tuple[int, str]:
    """Ask to send a body, wait for leave, and return the refusal that comes instead."""
    head = f"PUT {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n"
    with balancer.raw(head.encode() + b"Expect: 100-continue\r\n\r\n") as sock:
        return read_answer(sock.makefile("rb")).refusal


def test_a_refused_upload_is_refused_before_its_body(disk, mapped, servers):
    refusals = {"disk": (409, "image busy"), "file": (503, "too many parallel writes")}
    with putting(mapped, "/images/disk", 8 * MIB):
        for name, refusal in refusals.items():
            assert expecting(mapped, f"/images/{name}", 8 * MIB) == refusal
            answer = mapped.request("PUT", f"/images/{name}", bytes(8 * MIB))
            assert answer.refusal == refusal  # although all of it was sent
            assert answer.headers["Retry-After"] == "1"
    wait_until(lambda: servers[0].holders() == [])


@pytest.mark.parametrize("method", ["TRACE", "DELETE"])
def test_a_method_that_no_image_has_does_not_reach_a_host(mapped, method):
    answer = mapped.request(method, "/images/image-0")
    assert answer.refusal == (405, "method not allowed")
    assert answer.headers["Allow"] == "GET, HEAD, PUT, PATCH, POST, OPTIONS"


@pytest.mark.parametrize("path", ["/", "/metrics", "/images", "/imagesx/y", "/stats"])
def test_only_images_are_reached(mapped, path):
    assert mapped.request("GET", path).refusal == (404, "not found")


def test_a_slow_head_is_cut_with_408_and_silence_without_a_word(mapped):
    began = time.monotonic()
    with mapped.raw(b"GET /images/image-0 HTTP/1.1\r\nHos") as slow, mapped.raw() as silent:
        assert slow.makefile("rb").readline().startswith(b"HTTP/1.1 408 ")
        assert silent.recv(1) == b""
    assert 3 < time.monotonic() - began < 20


def test_a_request_id_is_the_clients_or_a_new_one_and_is_in_the_log(mapped):
    ask = ("GET", "/images/image-0")
    own = mapped.request(*ask, headers={"X-Request-Id": "backup-7"}).headers["X-Request-Id"]
    new = mapped.request(*ask).headers["X-Request-Id"]
    strange = mapped.request(*ask, headers={"X-Request-Id": "a b"}).headers["X-Request-Id"]
    uuid = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
    assert own == "backup-7"
    assert re.fullmatch(uuid, new)
    assert re.fullmatch(uuid, strange)
    for sent in (own, new, strange):
        wait_until(lambda sent=sent: f'{{{sent}}} "GET /images/image-0 ' in mapped.log)
    unknown = mapped.request("GET", "/images/none", headers={"X-Request-Id": "lost"})
    assert (unknown.status, unknown.headers["X-Request-Id"]) == (404, "lost")


#: Fields X-Request-Id, and whether they name the request: to haproxy and to the server alike.
NAMES: dict[str, tuple[list[str], bool]] = {
    "every character": (["09AZaz._:/+=@-"], True),
    "128 characters": (["x" * 128], True),
    "129 characters": (["x" * 129], False),
    "a comma": (["a,b"], False),
    "a comma at the end": (["a,"], False),
    "a blank": (["a b"], False),
    "nothing": ([""], False),
    "two fields": (["a", "b"], False),
    "the same twice": (["a", "a"], False),
    "quotes": (['"a"'], False),
}


@pytest.mark.parametrize("name", NAMES)
def test_haproxy_and_the_server_agree_on_what_names_a_request(mapped, servers, name):
    values, is_name = NAMES[name]
    fields = "".join(f"X-Request-Id: {value}\r\n" for value in values)
    for asked in (mapped, servers[1]):
        head = f"GET /images/image-0 HTTP/1.1\r\nHost: x\r\n{fields}\r\n"
        with asked.raw(head.encode()) as sock, sock.makefile("rb") as stream:
            answered = read_answer(stream).headers["X-Request-Id"]
        if is_name:
            assert [answered] == values
        else:
            assert re.fullmatch(r"[0-9a-f-]{16,36}", answered)


def test_a_request_that_was_sent_is_never_repeated(workplace):
    with recording() as one, recording() as two:
        ports = (one.port, two.port)
        with Balancer(workplace / "recorded", *ports, routing="shared") as balancer:
            assert [r.line for r in one.received + two.received][:2] == [
                "OPTIONS /images/* HTTP/1.1"
            ] * 2
            for method in ("PUT", "PATCH", "POST", "GET"):
                body = None if method == "GET" else bytes(300_000)
                headers = {"X-Request-Id": method}
                answer = balancer.request(method, "/images/image-0", body, headers)
                assert answer.refusal == (502, "connection to host lost")
                (received,) = one.of(method) + two.of(method)
                assert received.body == len(body or b"")
                assert received.fields["x-request-id"] == method
