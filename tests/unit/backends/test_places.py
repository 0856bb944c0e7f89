# SPDX-License-Identifier: Apache-2.0
"""Where image files lie: links and roots, and directories exchanged while a request looks."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from imageserver.backends.file import places
from imageserver.backends.file.places import find
from imageserver.core.errors import FileAccessError
from imageserver.core.transfer import path_text
from tests.unit.shortages import open_descriptors


@pytest.fixture(autouse=True)
def _nothing_stays_open() -> Iterator[None]:
    before = open_descriptors()
    yield
    assert open_descriptors() <= before


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with an image, links of every kind, and a neighbour outside."""
    root = tmp_path / "root"
    (root / "a" / "b").mkdir(parents=True)
    (root / "a" / "b" / "image").write_text("inside")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "image").write_text("outside")
    (root / "relative").symlink_to("a/b")
    (root / "absolute").symlink_to(root / "a")
    (root / "a" / "up").symlink_to("../relative/image")
    (root / "out").symlink_to("../outside")
    (root / "dangling").symlink_to("a/new")
    return root


def _read(path: Path, *roots: Path) -> str:
    with find(os.fsencode(path), tuple(map(os.fsencode, roots))) as place:
        fd = place.open(os.O_RDONLY)
    with os.fdopen(fd) as file:
        return file.read()


@pytest.mark.parametrize(
    "name", ["a/b/image", "relative/image", "absolute/b/image", "a/up", "out/../root/a/b/image"]
)
def test_links_that_lead_into_the_same_root_are_followed(root: Path, name: str) -> None:
    assert _read(root / name, root) == "inside"
    assert _read(root / name) == "inside"


def test_any_root_will_do_and_one_may_be_the_file_itself(root: Path) -> None:
    image = root / "a" / "b" / "image"
    assert _read(image, root.parent / "outside", root) == "inside"
    assert _read(root / "out" / "image", root, root.parent / "outside") == "outside"
    assert _read(image, image) == "inside"
    assert _read(image, Path("/")) == "inside"


@pytest.mark.parametrize("name", ["out/image", "../outside/image", "out", "..", "../root-alike"])
def test_what_lies_outside_of_all_roots_is_refused(root: Path, name: str) -> None:
    with pytest.raises(FileAccessError, match="outside IMAGESERVER_FILE_ROOTS"):
        find(os.fsencode(root / name), (os.fsencode(root),))


def test_the_root_directory_is_no_image() -> None:
    with pytest.raises(FileAccessError, match="is a directory"):
        find(b"/", ())


def test_a_link_to_nothing_is_a_place_for_a_new_file(root: Path) -> None:
    with find(os.fsencode(root / "dangling"), (os.fsencode(root),)) as place:
        assert place.path == os.fsencode(root / "a" / "new")
        with pytest.raises(FileNotFoundError):
            place.stat()


@pytest.mark.parametrize("missing", ["none/image", "a/b/image/x"])
def test_a_directory_that_lacks_is_an_error(root: Path, missing: str) -> None:
    with pytest.raises(OSError):  # noqa: PT011 - of either kind
        find(os.fsencode(root / missing), (os.fsencode(root),))


@pytest.fixture
def after_resolving(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Return what makes something happen between looking at a path's links and opening it."""
    resolve = places.resolved_name

    def then(what: Callable[[], object]) -> None:
        def resolve_then(path: bytes) -> bytes:
            real = resolve(path)
            what()
            return real

        monkeypatch.setattr(places, "resolved_name", resolve_then)

    return then


@pytest.mark.parametrize("part", ["a", "a/b", "a/b/image"])
def test_what_is_exchanged_for_a_link_meanwhile_is_not_followed(
    root: Path, after_resolving: Callable[[Callable[[], object]], None], part: str
) -> None:
    def exchange() -> None:
        (root / part).rename(root / "aside")
        (root / part).symlink_to(root.parent / "outside")

    after_resolving(exchange)
    with pytest.raises(OSError):  # noqa: PT011 - ELOOP or ENOTDIR
        _read(root / "a" / "b" / "image", root)


@pytest.mark.parametrize("with_roots", [False, True])
@pytest.mark.parametrize("part", ["root", "root/a", "root/a/b"])
def test_a_directory_on_the_way_that_becomes_a_link_meanwhile_is_never_used(
    root: Path,
    after_resolving: Callable[[Callable[[], object]], None],
    part: str,
    with_roots: bool,
) -> None:
    above = root.parent
    shutil.copytree(above / part, above / "other", symlinks=True)

    def exchange() -> None:
        (above / part).rename(above / "aside")
        (above / part).symlink_to(above / "other")

    after_resolving(exchange)
    with pytest.raises((FileAccessError, NotADirectoryError)):
        _read(root / "a" / "b" / "image", *([root] if with_roots else []))


def test_what_is_found_stays_found_when_its_directory_is_exchanged(root: Path) -> None:
    with find(os.fsencode(root / "a" / "b" / "image"), (os.fsencode(root),)) as place:
        (root / "a" / "b").rename(root / "aside")
        (root / "a" / "b").symlink_to(root.parent / "outside")
        directory = place.open_directory()
        try:
            assert os.path.samestat(os.fstat(directory), (root / "aside").stat())
        finally:
            os.close(directory)
        assert place.stat().st_ino == (root / "aside" / "image").stat().st_ino


def test_a_path_need_not_be_utf_8(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/\xff\xe4"
    with open(name, "w") as file:
        file.write("bytes")
    (tmp_path / "link").symlink_to(os.fsdecode(name))

    assert _read(tmp_path / "link", tmp_path) == "bytes"
    assert path_text(name) == f"{tmp_path}/\\xff\\xe4"
