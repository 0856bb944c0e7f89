# SPDX-License-Identifier: Apache-2.0
"""The identity of an image: what two ids of one image have in common, wherever links lead."""

import errno
import os
import re
from pathlib import Path

import pytest

from imageserver.backends.file.kind import FileImage
from imageserver.backends.nbd.kind import NbdImage
from imageserver.runtime.locks import image_key
from tests.unit.lockers import DISK


def test_a_key_is_32_hexadecimal_digits() -> None:
    assert re.fullmatch("[0-9a-f]{32}", image_key(DISK))


def test_ids_of_one_image_share_its_key(tmp_path: Path) -> None:
    (tmp_path / "real").touch()
    (tmp_path / "link").symlink_to("real")
    real, link = str(tmp_path / "real"), str(tmp_path / "link")

    assert image_key(FileImage(real)) == image_key(FileImage(link))
    assert image_key(FileImage(real)) == image_key(FileImage(link, raw=True, sparse=False))
    assert image_key(NbdImage(real, "x")) == image_key(NbdImage(link, "x", "bitmap"))


def test_a_real_path_that_is_not_utf_8_has_a_key_of_its_own(tmp_path: Path) -> None:
    keys = set()
    for number, name in enumerate((b"\xff", b"\xfe", "\ufffd".encode())):
        os.close(os.open(os.path.join(os.fsencode(tmp_path), name), os.O_CREAT))
        (tmp_path / f"link{number}").symlink_to(os.fsdecode(name))
        keys.add(image_key(FileImage(str(tmp_path / f"link{number}"))))
        keys.add(image_key(NbdImage(str(tmp_path / f"link{number}"))))
    assert len(keys) == 6


@pytest.mark.parametrize("times", [1, 1000])
def test_a_link_that_is_exchanged_while_it_is_looked_at_is_no_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, times: int
) -> None:
    (tmp_path / "link").symlink_to("real")
    really, left = os.readlink, [times]

    def readlink(path: bytes) -> bytes:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(errno.EINVAL, "no link any more")
        return really(path)

    monkeypatch.setattr(os, "readlink", readlink)
    name = "real" if times == 1 else "link"
    assert image_key(FileImage(f"{tmp_path}/link")) == image_key(FileImage(f"{tmp_path}/{name}"))


def test_a_link_in_the_middle_of_a_path_makes_no_other_image(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")

    assert image_key(FileImage(f"{tmp_path}/real/missing")) == image_key(
        FileImage(f"{tmp_path}/link/../link/missing")
    )


def test_a_directory_that_is_moved_leaves_no_image_a_key_of_its_old_place(tmp_path: Path) -> None:
    """The file is the same one at both paths; only the real path tells that both are one image."""
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    (old / "disk").touch()
    before = image_key(FileImage(f"{old}/disk"))
    old.rename(new)
    old.symlink_to(new)

    assert image_key(FileImage(f"{old}/disk")) == image_key(FileImage(f"{new}/disk")) != before


def test_a_link_moved_to_another_name_of_the_same_file_leads_to_that_names_image(
    tmp_path: Path,
) -> None:
    (tmp_path / "one").touch()
    os.link(tmp_path / "one", tmp_path / "two")
    keys = []
    for name in ("one", "two"):
        (tmp_path / "new").symlink_to(name)
        (tmp_path / "new").rename(tmp_path / "link")
        keys.append(image_key(FileImage(f"{tmp_path}/link")))

    assert keys == [image_key(FileImage(f"{tmp_path}/{name}")) for name in ("one", "two")]


@pytest.mark.parametrize("name", ["disk (deleted)", "disk\n", " "])
def test_a_file_with_a_name_like_what_the_kernel_says_is_itself(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    (tmp_path / "link").symlink_to(name)

    (found,) = FileImage(f"{tmp_path}/link").identity()
    assert found == os.path.realpath(os.fsencode(tmp_path / name))


def test_a_file_without_a_name_has_the_path_by_which_it_was_asked_for() -> None:
    reader, writer = os.pipe()
    try:
        (found,) = FileImage(f"/proc/{os.getpid()}/fd/{reader}").identity()
        assert found == os.path.realpath(f"/proc/{os.getpid()}/fd/{reader}").encode()
    finally:
        os.close(reader)
        os.close(writer)


def test_identities_need_three_system_calls_however_deep_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / "/".join("abcdefgh")
    deep.mkdir(parents=True)
    (deep / "disk").touch()
    monkeypatch.setattr(os, "lstat", lambda *_: pytest.fail("a look at each part of the path"))

    assert FileImage(f"{deep}/disk").identity() == (os.fsencode(os.path.abspath(deep / "disk")),)


def test_what_differs_in_kind_path_or_export_has_a_key_of_its_own() -> None:
    images = [
        NbdImage("/a"),
        NbdImage("/a", "b"),
        NbdImage("/a", "c"),
        NbdImage("/b"),
        FileImage("/a"),
        FileImage("/b"),
    ]

    assert len({image_key(image) for image in images}) == len(images)


def test_paths_and_exports_do_not_run_into_each_other() -> None:
    assert image_key(NbdImage("/ab", "c")) != image_key(NbdImage("/a", "bc"))
