# SPDX-License-Identifier: Apache-2.0
"""imagectl download where images change, servers lie and others meddle: right bytes, or no 0."""

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.system.harness import qemu_img, repeatable
from tests.system.moving import MIB, imagectl
from tests.system.threads import serving

SIZE = 8 * MIB
OLD, NEW = (repeatable(name).randbytes(SIZE) for name in ("old", "new"))


@dataclass
class Liar:
    """A server of ``data`` that breaks connections once ``allowed`` bytes have gone."""

    data: bytes
    extents: list[dict[str, object]] = field(default_factory=list)
    allowed: int = 1 << 40
    #: Called before a range is answered, with its start.
    hook: Callable[[int], object] = lambda _start: None
    url: str = ""

    def only(self, count: int) -> None:
        """Break off after so many bytes."""
        self.allowed = count


def extents(*spans: tuple[int, int], size: int = SIZE, dirty: bool = False, zero: bool = False):
    """Extents of data in these spans; with ``dirty`` of changes, of zeros if ``zero``."""
    said, position = [], 0
    for start, stop in [*spans, (size, size)]:
        for first, last, hit in ((position, start, False), (start, stop, True)):
            if first < last:
                is_zero = zero and hit if dirty else not hit
                fields = {"zero": is_zero, "dirty": hit and dirty}
                said.append({"start": first, "length": last - first, **fields})
        position = stop
    return said


@pytest.fixture
def serve() -> Iterator[Callable[..., Liar]]:
    with contextlib.ExitStack() as ending:

        def start(data: bytes, *spans: tuple[int, int], dirty: bool = False) -> Liar:
            liar = Liar(data, extents(*(spans or [(0, len(data))]), size=len(data), dirty=dirty))
            listener = ThreadingHTTPServer(("127.0.0.1", 0), handler(liar))
            ending.enter_context(serving(listener))
            liar.url = f"http://127.0.0.1:{listener.server_port}/images/x"
            return liar

        yield start


def handler(liar: Liar) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_args: object) -> None:
            pass

        def answer(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: liar.allowed] if status == 206 else body)
            if status == 206:
                self.close_connection = liar.allowed < len(body)
                liar.allowed -= min(len(body), liar.allowed)

        def do_OPTIONS(self) -> None:
            self.answer(200, b'{"features":["extents"],"max_readers":4}', Allow="GET")

        def do_HEAD(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(liar.data)))
            self.end_headers()

        def do_GET(self) -> None:
            if "/extents" in self.path:
                self.answer(200, json.dumps(liar.extents).encode())
                return
            first, last = re.findall("[0-9]+", self.headers["Range"])
            liar.hook(int(first))
            body = liar.data[int(first) : int(last) + 1]
            self.answer(206, body, Content_Range=f"bytes {first}-{last}/{len(liar.data)}")

    return Handler


def broken_off(liar: Liar, copy: Path, *options: object, after: int = 4 * MIB) -> None:
    """Download until the server goes away."""
    liar.only(after)
    imagectl("download", liar.url, copy, "-n", 1, "--patience", 0, *options, status=1)
    liar.only(1 << 40)


def half_updated(serve: Callable[..., Liar], home: Path) -> tuple[Liar, Path, bytes]:
    """A copy of OLD of whose first 6 MiB some are new; the server, the copy, what it is to be."""
    copy, wanted = home / "copy", NEW[: 6 * MIB] + OLD[6 * MIB :]
    copy.write_bytes(OLD)
    liar = serve(wanted, (0, 6 * MIB), dirty=True)
    broken_off(liar, copy, "--incremental", after=2 * MIB)
    assert (home / "copy.incremental.state").exists()
    return liar, copy, wanted


def test_half_an_update_is_not_updated_with_other_changes(serve, home: Path):
    liar, copy, wanted = half_updated(serve, home)
    liar.extents = extents((7 * MIB, SIZE), dirty=True)
    for _ in range(2):
        said = imagectl("download", liar.url, copy, "--incremental", status=5).stderr
        assert f"{copy} is half old, half new" in said
    broken_off(liar, copy, "--force")
    imagectl("download", liar.url, copy, "--incremental", status=5)
    liar.extents = extents((0, SIZE), size=SIZE)
    imagectl("download", liar.url, copy, "--force")
    assert copy.read_bytes() == wanted
    assert list(home.glob("copy*")) == [copy]


@pytest.mark.parametrize("spans", [[(0, 6 * MIB)], [(MIB, 7 * MIB)]], ids=["same", "other"])
def test_half_an_update_is_made_whole_by_what_covers_it(serve, home: Path, spans):
    liar, copy, wanted = half_updated(serve, home)
    liar.extents = extents(*spans, dirty=True)
    imagectl("download", liar.url, copy, "--incremental", "--verify")
    assert copy.read_bytes() == wanted
    assert list(home.glob("copy*")) == [copy]


def test_half_an_update_is_no_base(serve, home: Path):
    liar, copy, _wanted = half_updated(serve, home)
    options = ("--incremental", "--base", copy)
    said = imagectl("download", liar.url, home / "overlay", *options, status=5).stderr
    assert said == f"imagectl: {copy} is half old, half new: it can be no base\n"


def test_another_image_of_the_same_layout_is_not_gone_on_with(serve, home: Path):
    liar, copy = serve(OLD), home / "copy"
    broken_off(liar, copy)
    liar.data = NEW
    said = imagectl("download", liar.url, copy).stderr
    assert said == f"{copy}.part is not what the server has now: starting again.\n"
    assert copy.read_bytes() == NEW


def test_another_url_begins_anew(serve, home: Path):
    liar, copy = serve(OLD), home / "copy"
    broken_off(liar, copy)
    said = imagectl("download", f"{liar.url}y", copy).stderr
    assert said == "The URL is not the one that was being downloaded: starting again.\n"
    assert copy.read_bytes() == OLD


def test_what_differs_once_is_not_gone_on_with(serve, home: Path):
    liar, copy = serve(OLD), home / "copy"

    broken_off(liar, copy, after=7 * MIB)
    part, state = home / "copy.part", home / "copy.part.state"

    def damage(start: int) -> None:
        if start == 7 * MIB:  # after the samples
            with part.open("r+b") as file:
                file.seek(MIB)
                file.write(bytes(4096))

    liar.hook = damage
    said = imagectl("download", liar.url, copy, "--verify", status=4).stderr
    assert said.endswith("; the next run fetches all again\n")
    assert not state.exists()
    liar.hook = lambda _start: None
    imagectl("download", liar.url, copy)
    assert copy.read_bytes() == OLD


def test_an_image_that_is_replaced_meanwhile_is_different(serve, home: Path):
    liar, copy = serve(OLD), home / "copy"
    asked = iter(range(100))

    def change(_start: int) -> None:
        if next(asked):
            liar.data = NEW

    liar.hook = change
    said = imagectl("download", liar.url, copy, "-n", 1, "--verify", status=4).stderr
    assert said.endswith("; the next run fetches all again\n")
    assert not (home / "copy.part.state").exists()
    imagectl("download", liar.url, copy)
    assert copy.read_bytes() == NEW


def test_extents_must_cover_the_image(serve, home: Path):
    liar, copy = serve(OLD), home / "copy"
    liar.extents = extents((0, MIB), size=MIB)
    assert imagectl("download", liar.url, copy, status=1).stderr == (
        f"imagectl: the extents end at {MIB}, the image at {SIZE}: "
        "it is being changed, or the server is wrong\n"
    )
    assert not list(home.glob("copy*"))


def test_an_overlay_stays_with_its_base(serve, home: Path):
    first, second, copy = home / "first", home / "second", home / "copy"
    first.write_bytes(bytes(SIZE))
    second.write_bytes(OLD)
    liar = serve(NEW[: 6 * MIB] + OLD[6 * MIB :], (0, 6 * MIB), dirty=True)
    broken_off(liar, copy, "--incremental", "--base", first, after=2 * MIB)
    imagectl("download", liar.url, copy, "--incremental", "--base", second)
    (home / "whole").write_bytes(liar.data)
    assert "identical" in qemu_img("compare", "-f", "raw", "-F", "qcow2", home / "whole", copy)


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_a_part_of_another_length_is_not_gone_on_with(serve, home: Path, form: str):
    liar, copy, part = serve(OLD), home / "copy", home / "copy.part"
    broken_off(liar, copy, "--format", form)
    if form == "raw":
        os.truncate(part, SIZE + 1)
    else:
        qemu_img("resize", "-q", "-f", "qcow2", part, "+1M")
    said = imagectl("download", liar.url, copy, "--format", form).stderr
    assert said == f"{part} is not as it was left: starting again.\n"
    (home / "whole").write_bytes(OLD)
    same = qemu_img("compare", "-f", "raw", "-F", form, home / "whole", copy)
    assert same == "Images are identical.\n"


def test_a_hole_with_bytes_in_it_is_found_by_verify(serve, home: Path):
    liar, copy = serve(OLD[:MIB] + bytes(6 * MIB) + OLD[7 * MIB :]), home / "copy"
    liar.extents = extents((0, MIB), (7 * MIB, SIZE))
    broken_off(liar, copy, after=MIB)
    with (home / "copy.part").open("r+b") as file:
        file.seek(3 * MIB)
        file.write(b"x")
    said = imagectl("download", liar.url, copy, "--verify", status=4).stderr
    assert said.startswith("imagectl: what should be zero between ")
    imagectl("download", liar.url, copy)
    assert copy.read_bytes() == liar.data


def test_a_file_that_came_meanwhile_stays(serve, home: Path):
    liar, copy = serve(OLD), home / "copy"
    liar.hook = lambda _start: copy.write_text("precious")
    said = imagectl("download", liar.url, copy, status=5).stderr
    assert said == f"imagectl: {copy} exists: --force replaces it\n"
    assert copy.read_text() == "precious"
    liar.hook = lambda _start: None
    assert (
        json.loads(imagectl("download", liar.url, copy, "--force", "--json").stdout)["moved"] == 0
    )
    assert copy.read_bytes() == OLD


def test_a_planted_link_is_not_followed(serve, home: Path):
    target, part = home / "target", home / "copy.part"
    target.write_text("precious")
    part.symlink_to(target)
    said = imagectl("download", serve(OLD).url, home / "copy", status=5).stderr
    assert said == f"imagectl: {part} is no regular file: remove it first\n"
    assert target.read_text() == "precious"


def test_a_refused_base_leaves_nothing(serve, home: Path):
    base = home / "base"
    base.write_bytes(bytes(MIB))
    liar = serve(OLD, (0, MIB), dirty=True)
    imagectl("download", liar.url, home / "copy", "--incremental", "--base", base, status=5)
    assert not list(home.glob("copy*"))
