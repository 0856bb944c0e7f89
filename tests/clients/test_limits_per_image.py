# SPDX-License-Identifier: Apache-2.0
"""Limits per image beneath the totals: clients that open what they were offered are served."""

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from ovirt_imageio import client

from tests.clients.ovirt import LEAVES_A_CONNECTION
from tests.system.clients import one_connection_each, reading
from tests.system.disks import sparse
from tests.system.harness import (
    Server,
    exchange,
    qemu_img,
    qemu_nbd,
    repeatable,
    wait_until,
)
from tests.system.killing import kill_worker

IMAGES, SIZE = 10, 2 << 20
LARGE = 64 << 20  # more than the socket buffers of a connection hold
TOTALS = {"max_readers": 64, "max_writers": 64}
PER_IMAGE = {"max_readers_per_image": 4, "max_writers_per_image": 4}
LIMITS = {"max_readers": 4, "max_writers": 4}
TOO_MANY_READS = (503, "too many parallel reads")

pytestmark = LEAVES_A_CONNECTION


@pytest.fixture(scope="module")
def server(workplace: Path) -> Iterator[Server]:
    home = workplace / "limited"
    home.mkdir()
    with Server(home, **TOTALS, **PER_IMAGE) as running:
        yield running


@pytest.fixture(scope="module")
def large(server: Server, workplace: Path) -> dict[str, str]:
    """Two ids of one file that is large, one of another; a link names the file the second time."""
    files = [sparse(workplace / name, LARGE) for name in ("large", "other")]
    (workplace / "link").symlink_to("large")
    named = {"one": files[0], "again": workplace / "link", "other": files[1]}
    return {name: server.add(name, backend="file", file=str(path)) for name, path in named.items()}


@contextlib.contextmanager
def four_readers(server: Server, *paths: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for number in range(4):
            stack.enter_context(reading(server, paths[number % len(paths)]))
        yield
    wait_until(lambda: server.holders() == [])


def test_options_offers_the_smaller_of_the_two_limits(server, workplace):
    (workplace / "probed").write_bytes(bytes(SIZE))
    with qemu_nbd(workplace / "probed", "--shared=0") as sock:
        path = server.add("probed", socket=str(sock))
        answers = [server.request("OPTIONS", where).json for where in (path, "/images/*", "*")]
    assert [{name: answer[name] for name in LIMITS} for answer in answers] == [LIMITS] * 3


def test_ten_downloads_and_ten_uploads_at_once_of_four_connections_each_succeed(
    server, workplace, tmp_path
):
    """By oVirt's client, which gives up at the first 503."""
    content = repeatable("filled").randbytes(SIZE)
    source = tmp_path / "source"
    source.write_bytes(content)
    urls = []
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(2 * IMAGES) as clients:
        for number in range(2 * IMAGES):
            disk = workplace / f"disk{number}"
            disk.write_bytes(content if number < IMAGES else bytes(SIZE))
            sock = stack.enter_context(qemu_nbd(disk, "--shared=0"))
            path = server.add(f"disk{number}", socket=str(sock))
            urls.append(f"http://127.0.0.1:{server.port}{path}")

        def copy(number: int) -> None:
            wires = {"max_workers": 4, "buffer_size": 64 << 10}
            if number < IMAGES:
                target = str(tmp_path / f"copy{number}")
                client.download(urls[number], target, None, fmt="raw", **wires)
            else:
                client.upload(str(source), urls[number], None, **wires)

        list(clients.map(copy, range(2 * IMAGES)))
    copies = [tmp_path / f"copy{number}" for number in range(IMAGES)]
    written = [workplace / f"disk{number}" for number in range(IMAGES, 2 * IMAGES)]
    for copied in copies + written:
        assert copied.read_bytes() == content
    qemu_img("compare", "-f", "raw", "-F", "raw", source, copies[0])


def test_the_fifth_reader_of_an_image_is_refused_by_every_worker_under_each_of_its_ids(
    server, large
):
    begun = len(server.log)
    with one_connection_each(server) as connections, four_readers(server, large["one"]):
        for connection in connections:
            for name in ("one", "again"):
                answer = exchange(connection, "GET", large[name])
                assert answer.refusal == TOO_MANY_READS
                assert int(answer.headers["Retry-After"]) >= 1
            where = {"Range": "bytes=0-9"}
            assert exchange(connection, "GET", large["other"], None, where).status == 206
        assert server.request("HEAD", large["one"]).status == 200
        assert server.request("POST", f"{large['one']}/flush").status == 200
    lines = server.log[begun:].splitlines()
    refused = [line for line in lines if "status=503" in line]
    assert len(refused) == 2 * len(connections)
    assert all('error=NoImageSlot detail="no free read slot of this image"' in s for s in refused)


def test_a_killed_workers_slots_come_back_to_the_image(server, large):
    with contextlib.ExitStack() as stack:
        readers = [stack.enter_context(reading(server, large["one"])) for _ in range(4)]
        assert server.request("GET", large["again"]).refusal == TOO_MANY_READS
        kill_worker(server, readers[0])
        where = {"Range": "bytes=0-9"}
        assert server.request("GET", large["again"], None, where).status == 206
    wait_until(lambda: server.holders() == [])
    wait_until(lambda: len(server.worker_pids()) == server.workers)
    with four_readers(server, large["one"], large["again"]):
        assert server.request("GET", large["one"]).refusal == TOO_MANY_READS


def write_at_last(server: Server, path: str, number: int, barrier: threading.Barrier) -> set[int]:
    """Write one block a few times over one connection, again at once where there was no slot."""
    first, left, seen = number * 512, 3, set()
    where = {"Content-Range": f"bytes {first}-{first + 511}/*"}
    with contextlib.closing(server.connect()) as connection:
        barrier.wait()
        while left:
            status = exchange(connection, "PUT", path, bytes(512), where).status
            left -= status == 200
            seen.add(status)
    return seen


def test_sixty_four_writers_of_an_image_find_no_slot_or_succeed_and_none_is_told_busy(
    server, workplace
):
    many = 64
    (workplace / "many").write_bytes(bytes(many * 512))
    barrier = threading.Barrier(many, timeout=60)
    with qemu_nbd(workplace / "many", "--shared=0") as sock, ThreadPoolExecutor(many) as clients:
        path = server.add("many", socket=str(sock))
        seen = clients.map(lambda n: write_at_last(server, path, n, barrier), range(many))
        assert set.union(*seen) == {200, 503}
    assert server.holders() == []
