# SPDX-License-Identifier: Apache-2.0
"""imagectl download --incremental: what it is based on, and half of it, by whatever name."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system.harness import qemu_img
from tests.system.lying import NEW, OLD, SIZE, Liar, broken_off, extents
from tests.system.moving import MIB, imagectl

#: What the server has once its first 6 MiB have changed.
CHANGED = NEW[: 6 * MIB] + OLD[6 * MIB :]
Serve = Callable[..., Liar]


@pytest.fixture
def liar(serve: Serve) -> Liar:
    """A server of OLD whose first 6 MiB have changed."""
    return serve(CHANGED, (0, 6 * MIB), dirty=True)


@pytest.fixture
def old(home: Path) -> Path:
    path = home / "old"
    path.write_bytes(OLD)
    return path


def once(what: Callable[[], object], after: int = 0) -> Callable[[int], None]:
    """A liar's hook that does something when so many ranges have been asked for."""
    left = iter([*[lambda: None] * after, what])
    return lambda _start: next(left, lambda: None)()  # type: ignore[no-untyped-call]


NAMES = {"same": lambda old, _new: old, "link": os.symlink, "hard link": os.link}


@pytest.mark.parametrize("name", NAMES)
def test_an_image_is_no_base_of_itself(liar: Liar, home: Path, old: Path, name: str):
    other = home / "other"
    file = old if NAMES[name](old, other) else other
    for copy, base in ((file, old), (old, file)):
        asked = ("--incremental", "--base", base, "--force")
        said = imagectl("download", liar.url, copy, *asked, status=5).stderr
        assert said == f"imagectl: {base} is {copy}: an image can be no base of itself\n"
    assert old.read_bytes() == OLD
    assert set(home.iterdir()) == {old, file}


def test_what_is_written_first_is_no_base(liar: Liar, home: Path):
    part = home / "copy.part"
    part.write_bytes(OLD)
    asked = ("--incremental", "--base", part)
    said = imagectl("download", liar.url, home / "copy", *asked, status=5).stderr
    assert said == f"imagectl: {part} is {part}: an image can be no base of itself\n"
    assert part.read_bytes() == OLD


def test_the_rest_of_a_download_is_no_base(serve: Serve, liar: Liar, home: Path):
    broken_off(serve(OLD), home / "old")
    part = home / "old.part"
    asked = ("--incremental", "--base", part)
    said = imagectl("download", liar.url, home / "copy", *asked, status=5).stderr
    assert said == (f"imagectl: {part} is the rest of an interrupted download: it can be no base\n")


def test_what_is_based_on_an_image_is_no_base_of_it(liar: Liar, home: Path, old: Path):
    first = home / "first"
    imagectl("download", liar.url, first, "--incremental", "--base", old)
    asked = ("--incremental", "--base", first, "--base-format", "qcow2", "--force")
    said = imagectl("download", liar.url, old, *asked, status=5).stderr
    assert said == f"imagectl: {first} is based on {old}: it can be no base of that\n"
    assert old.read_bytes() == OLD
    assert set(home.iterdir()) == {old, first}


def test_half_an_update_is_known_by_every_link(liar: Liar, home: Path, old: Path):
    link, state = home / "link", home / "old.incremental.state"
    link.symlink_to(old)
    broken_off(liar, link, "--incremental", after=2 * MIB)
    for name in (old, link):
        said = imagectl("upload", name, liar.url, status=5).stderr
        assert said == (
            f"imagectl: {name} is the rest of an interrupted download, as {state} tells: "
            "download it to its end first\n"
        )
        asked = ("--incremental", "--base", name)
        said = imagectl("download", liar.url, home / "overlay", *asked, status=5).stderr
        assert said == f"imagectl: {name} is half old, half new: it can be no base\n"
    liar.extents = extents((7 * MIB, SIZE), dirty=True)
    said = imagectl("download", liar.url, old, "--incremental", status=5).stderr
    assert f"{old} is half old, half new" in said
    liar.extents = extents((0, 6 * MIB), dirty=True)
    imagectl("download", liar.url, old, "--incremental")
    assert old.read_bytes() == CHANGED
    assert set(home.iterdir()) == {old, link}


def test_a_link_that_is_replaced_leaves_half_an_update_half(liar: Liar, home: Path, old: Path):
    link, state = home / "link", home / "old.incremental.state"
    link.symlink_to(old)
    broken_off(liar, link, "--incremental", after=2 * MIB)
    liar.extents = extents((0, SIZE))
    imagectl("download", liar.url, link, "--force")
    assert (link.is_symlink(), link.read_bytes()) == (False, CHANGED)
    assert set(home.iterdir()) == {old, link, state}


def test_a_file_with_hard_links_is_not_updated(liar: Liar, home: Path, old: Path):
    os.link(old, home / "other")
    said = imagectl("download", liar.url, old, "--incremental", status=5).stderr
    assert said == (
        f"imagectl: {old} is a file of 2 names (hard links), and the others would not show "
        "that it is half old, half new: cp it, and download into the copy\n"
    )
    assert old.read_bytes() == OLD
    assert set(home.iterdir()) == {old, home / "other"}


def write_to(base: Path) -> None:
    with base.open("r+b") as file:
        file.seek(7 * MIB)
        file.write(b"x")


def replace(base: Path) -> None:
    other, now = base.with_suffix(".other"), base.stat()
    other.write_bytes(NEW)
    os.utime(other, ns=(now.st_atime_ns, now.st_mtime_ns))
    other.rename(base)


def halve(base: Path) -> None:
    Path(f"{base}.incremental.state").touch()


@pytest.mark.parametrize("change", [write_to, replace, halve])
def test_a_base_that_is_changed_meanwhile_is_found_out(
    liar: Liar, home: Path, old: Path, change: Callable[[Path], None]
):
    copy = home / "copy"
    liar.hook = once(lambda: change(old))
    asked = ("download", liar.url, copy, "--incremental", "--base", old)
    said = imagectl(*asked, status=4).stderr
    assert said == (
        f"imagectl: {old}, the base, was changed meanwhile; the next run fetches all again\n"
    )
    assert not copy.exists()
    Path(f"{old}.incremental.state").unlink(missing_ok=True)
    said = imagectl(*asked).stderr
    assert said == f"{copy}.part is not to be trusted: starting again.\n"


def test_a_base_is_not_updated_while_it_is_needed(liar: Liar, home: Path, old: Path):
    copy, said = home / "copy", []

    def update() -> None:
        said.append(imagectl("download", liar.url, old, "--incremental", status=5).stderr)

    liar.hook = once(update)
    imagectl("download", liar.url, copy, "--incremental", "--base", old, "--verify")
    assert said == [f"imagectl: {old}: another download of this file is running\n"]
    (home / "whole").write_bytes(CHANGED)
    assert "identical" in qemu_img("compare", "-f", "raw", "-F", "qcow2", home / "whole", copy)


def test_an_image_that_is_being_updated_is_no_base(liar: Liar, home: Path, old: Path):
    said = []

    def rest() -> None:
        (home / "old.incremental.state").unlink()  # which would be enough
        asked = ("--incremental", "--base", old)
        said.append(imagectl("download", liar.url, home / "copy", *asked, status=5).stderr)

    liar.hook = once(rest)
    imagectl("download", liar.url, old, "--incremental")
    assert said == [f"imagectl: {old}: another download of this file is running\n"]
    assert set(home.iterdir()) == {old}


def test_an_update_says_nothing_of_the_file_that_replaced_its_own(
    serve: Serve, liar: Liar, home: Path, old: Path
):
    whole = serve(NEW)
    liar.hook = once(lambda: imagectl("download", whole.url, old, "--force"))
    said = imagectl("download", liar.url, old, "--incremental", status=5).stderr
    assert said == f"imagectl: {old} was replaced by another file meanwhile\n"
    assert old.read_bytes() == NEW
    assert set(home.iterdir()) == {old}


@pytest.mark.parametrize("size", [1, 513, MIB + 511])
def test_an_image_of_no_whole_sectors_is_updated_as_qcow2(serve: Serve, home: Path, size: int):
    liar, copy, whole = serve(OLD[:size]), home / "copy", home / "whole"
    imagectl("download", liar.url, copy, "--format", "qcow2")
    liar.data, liar.extents = NEW[:size], extents((0, size), size=size, dirty=True)
    whole.write_bytes(NEW[:size])
    based = ("--incremental", "--base", copy, "--base-format", "qcow2", "--verify")
    imagectl("download", liar.url, home / "overlay", *based)
    imagectl("download", liar.url, copy, "--incremental", "--format", "qcow2", "--verify")
    (home / "raw").write_bytes(OLD[:size])
    based = ("--incremental", "--base", home / "raw", "--verify")
    imagectl("download", liar.url, home / "raw-overlay", *based)
    for image in (copy, home / "overlay", home / "raw-overlay"):
        assert "identical" in qemu_img("compare", "-f", "raw", "-F", "qcow2", whole, image)


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_a_base_of_another_size_is_refused_with_its_own(serve: Serve, home: Path, form: str):
    base, size = home / "base", {"raw": 513, "qcow2": 1536}[form]
    qemu_img("create", "-q", "-f", form, base, size)
    if form == "raw":
        os.truncate(base, size)
    liar = serve(OLD[:514], (0, 512), dirty=True)
    asked = ("--incremental", "--base", base, "--base-format", form)
    said = imagectl("download", liar.url, home / "copy", *asked, status=5).stderr
    assert said == (
        f"imagectl: {base} has {size} bytes, the image 514: it is no earlier state of it\n"
    )
    assert set(home.iterdir()) == {base}
