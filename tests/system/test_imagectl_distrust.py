# SPDX-License-Identifier: Apache-2.0
"""imagectl download where images change, servers lie and others meddle: right bytes, or no 0."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system.harness import qemu_img
from tests.system.lying import NEW, OLD, SIZE, Liar, broken_off, extents
from tests.system.moving import MIB, imagectl


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
    part = home / "copy.part"

    def damage(start: int) -> None:
        if start == 7 * MIB:  # after the samples
            with part.open("r+b") as file:
                file.seek(MIB)
                file.write(bytes(4096))

    liar.hook = damage
    said = imagectl("download", liar.url, copy, "--verify", status=4).stderr
    assert said.endswith("; the next run fetches all again\n")
    said = imagectl("upload", part, liar.url, status=5).stderr
    assert said.startswith(f"imagectl: {part} is the rest of an interrupted download")
    liar.hook = lambda _start: None
    said = imagectl("download", liar.url, copy).stderr
    assert said == f"{part} is not to be trusted: starting again.\n"
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
    imagectl("upload", home / "copy.part", liar.url, status=5)
    imagectl("download", liar.url, copy)
    assert copy.read_bytes() == NEW
    assert list(home.glob("copy*")) == [copy]


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
