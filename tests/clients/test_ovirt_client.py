# SPDX-License-Identifier: Apache-2.0
"""oVirt's own client, unmodified: over TCP, the Unix socket and TLS, with one writer and four."""

import io
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from ovirt_imageio import client
from ovirt_imageio._internal.http import Error
from ovirt_imageio.client import ImageioClient

from tests.clients.ovirt import LEAVES_A_CONNECTION, collected  # noqa: F401 - fixture
from tests.system.disks import offered
from tests.system.harness import Server, qemu_img, qemu_io, qemu_nbd, repeatable, wait_until
from tests.system.pki import TlsServer, make_pki

K, M = 1 << 10, 1 << 20
SIZE = 32 * M

pytestmark = LEAVES_A_CONNECTION


@dataclass(frozen=True)
class Place:
    """A server as a client sees it."""

    server: Server
    origin: str
    cafile: str | None
    unix_socket: str | None
    writers: int

    def url(self, name: str) -> str:
        return f"{self.origin}/images/{name}"

    def upload(self, image: Path, name: str, **options: object) -> None:
        client.upload(str(image), self.url(name), self.cafile, max_workers=4, **options)

    def download(self, name: str, image: Path, **options: object) -> None:
        client.download(self.url(name), str(image), self.cafile, max_workers=4, **options)

    def open(self, name: str) -> ImageioClient:
        return ImageioClient(self.url(name), cafile=self.cafile)


WIRES = ("tcp", "unix", "abstract", "tls")
PLACES = [
    pytest.param(place, id=f"{place[0]}-{place[1]}")
    for place in itertools.product(WIRES, (1, 4))
    if place != ("abstract", 1)
]


@pytest.fixture(scope="module", params=PLACES)
def place(request: pytest.FixtureRequest, workplace: Path) -> Iterator[Place]:
    wire, writers = request.param
    home = workplace / f"{wire}-{writers}"
    home.mkdir()
    pki = make_pki(workplace / "pki") if wire == "tls" else None
    server = TlsServer(home, pki, max_writers=writers) if pki else Server(home, max_writers=writers)
    path = {"unix": str(home / "http.sock"), "abstract": f"@{home}/http"}.get(wire)
    if path:
        server.env["IMAGESERVER_BIND"] += f",unix:{path}"
    origin = f"{'https' if pki else 'http'}://localhost:{server.port}"
    with server:
        cafile = str(pki / "ca.crt") if pki else None
        yield Place(server, origin, cafile, path and path.replace("@", "\0", 1), writers)


@pytest.fixture(scope="module")
def sources(workplace: Path) -> dict[str, Path]:
    """The same data as a raw and a qcow2 image, with holes, zeros, and scattered writes."""
    qcow2, raw = workplace / "source.qcow2", workplace / "source.raw"
    qemu_img("create", "-q", "-f", "qcow2", qcow2, SIZE)
    rng = repeatable("scattered")
    scattered = (f"write -P {n + 1} {rng.randrange(24 * 16) * 64}k 64k" for n in range(40))
    qemu_io(qcow2, "qcow2", "write -P 1 0 1M", "write -P 2 4M 8M", "write -z 6M 1M", *scattered)
    qemu_io(qcow2, "qcow2", f"write -P 9 {SIZE - 512} 512")
    qemu_img("convert", "-f", "qcow2", "-O", "raw", qcow2, raw)
    return {"qcow2": qcow2, "raw": raw}


def assert_identical(one: Path, fmt: str, other: Path, other_fmt: str) -> None:
    """As qemu-img sees it; it fails for images that differ."""
    said = qemu_img("compare", "-U", "-f", fmt, "-F", other_fmt, one, other)
    assert said.strip() == "Images are identical."


KINDS = pytest.mark.parametrize("kind", ["nbd", "raw"])


@pytest.mark.parametrize(
    ("source_fmt", "target_fmt", "kind"),
    [
        ("qcow2", "qcow2", "nbd"),
        ("raw", "qcow2", "nbd"),
        ("qcow2", "raw", "nbd"),
        ("qcow2", "raw", "raw"),
        ("raw", "raw", "raw"),
    ],
)
def test_an_upload_replaces_what_was_there(place, sources, tmp_path, source_fmt, target_fmt, kind):
    target = tmp_path / "target"
    qemu_img("create", "-q", "-f", target_fmt, target, SIZE)
    qemu_io(target, target_fmt, f"write -P 255 0 {SIZE}")
    seen: list[int] = []
    options = {"fmt": target_fmt, "sock": place.server.directory / "target.sock"}
    with offered(place.server, kind, "target", target, "--discard=unmap", **options):
        place.upload(sources[source_fmt], "target", progress=seen.append)
        wait_until(lambda: place.server.holders() == [])
    assert sum(seen) == SIZE
    assert_identical(sources[source_fmt], source_fmt, target, target_fmt)


@pytest.mark.parametrize(("fmt", "kind"), [("raw", "nbd"), ("qcow2", "nbd"), ("qcow2", "raw")])
def test_a_download_over_four_connections_is_the_image(place, sources, tmp_path, fmt, kind):
    served = "raw" if kind == "raw" else "qcow2"
    options = {"fmt": served, "sock": place.server.directory / "source.sock"}
    with offered(place.server, kind, "source", sources[served], "--read-only", **options):
        place.download("source", tmp_path / "copy", fmt=fmt)
    assert_identical(sources["qcow2"], "qcow2", tmp_path / "copy", fmt)


def test_a_file_is_downloaded_as_it_is(place, sources, tmp_path):
    place.server.add("file", backend="file", file=str(sources["raw"]))
    place.download("file", tmp_path / "copy", fmt="raw")
    assert (tmp_path / "copy").read_bytes() == sources["raw"].read_bytes()


def test_the_changes_since_a_backup_lie_upon_that_backup(place, sources, tmp_path):
    """A full backup, then the dirty parts as a qcow2 image with the backup beneath."""
    disk, full, changes = (tmp_path / name for name in ("disk.qcow2", "full.qcow2", "inc.qcow2"))
    qemu_img("convert", "-f", "qcow2", "-O", "qcow2", sources["qcow2"], disk)
    qemu_img("bitmap", "--add", disk, "b0")
    sock = place.server.directory / "disk.sock"
    fields = {"socket": str(sock), "export_bitmap": "b0"}
    with qemu_nbd(disk, "--read-only", "--bitmap=b0", fmt="qcow2", sock=sock):
        place.server.add("disk", **fields)
        place.download("disk", full, fmt="qcow2")
    qemu_io(disk, "qcow2", "write -P 77 3M 1M", "write -z 4M 1M", "write -P 78 20M 64k")
    with qemu_nbd(disk, "--read-only", "--bitmap=b0", fmt="qcow2", sock=sock):
        place.server.add("disk", **fields)
        backing = {"backing_file": str(full), "backing_format": "qcow2"}
        place.download("disk", changes, fmt="qcow2", incremental=True, **backing)
    assert_identical(disk, "qcow2", changes, "qcow2")
    copied = qemu_img("map", "--output=json", changes).count('"depth": 0')
    assert 0 < copied <= 4


@KINDS
def test_pieces_are_read_written_zeroed_flushed_and_mapped(place, tmp_path, kind):
    with (tmp_path / "disk").open("wb") as disk:
        disk.truncate(8 * M)
    sock = place.server.directory / "pieces.sock"
    data = repeatable("data").randbytes(M)
    image = tmp_path / "disk"
    with offered(place.server, kind, "pieces", image, "--discard=unmap", sock=sock):
        with place.open("pieces") as images:
            assert (images.max_readers, images.max_writers) == (8, place.writers)
            if place.unix_socket:
                assert images._backend.server_address == place.unix_socket
            assert images.size() == 8 * M
            images.write(M, data)
            images.read_from(io.BytesIO(data), 4 * M, M)
            images.zero(M + 64 * K, 64 * K)
            images.flush()
            buffer, stream = bytearray(M), io.BytesIO()
            assert images.read(M, buffer) == M
            images.write_to(stream, 4 * M, M)
        with place.open("pieces") as again:  # which has not remembered the extents
            mapped = [(e.start, e.length, e.zero) for e in again.extents()]
            dirty = {e.dirty for e in again.extents("dirty")}
    zeroed = data[: 64 * K] + bytes(64 * K) + data[128 * K :]
    assert (bytes(buffer), stream.getvalue()) == (zeroed, data)
    assert (tmp_path / "disk").read_bytes()[M : 2 * M] == zeroed
    assert mapped[:4] == [
        (0, M, True),
        (M, 64 * K, False),
        (M + 64 * K, 64 * K, True),
        (M + 128 * K, M - 128 * K, False),
    ]
    assert dirty == {True}  # no bitmap: a full backup is always right


def test_refusals_reach_the_user_as_they_are(place, tmp_path, sources):
    with pytest.raises(Error, match="unknown image_id"):
        place.upload(sources["raw"], "nobody")
    sock = place.server.directory / "frozen.sock"
    with qemu_nbd(sources["raw"], "--read-only", sock=sock):
        place.server.add("frozen", socket=str(sock))
        with place.open("frozen") as images:
            assert images.max_writers == 0
            with pytest.raises(Error, match="method not allowed"):
                images.write(0, b"x")
            buffer = bytearray(512)
            images.read(SIZE - 512, buffer)
            assert buffer == b"\x09" * 512


def test_an_upload_that_does_not_fit_fails_and_gives_all_back(place, sources, tmp_path):
    (tmp_path / "small").write_bytes(bytes(SIZE // 2))
    sock = place.server.directory / "small.sock"
    with qemu_nbd(tmp_path / "small", sock=sock):
        place.server.add("small", socket=str(sock))
        with pytest.raises(Error, match=r"range not satisfiable|offset must be less than"):
            place.upload(sources["raw"], "small")
        assert wait_until(lambda: place.server.holders() == [])
