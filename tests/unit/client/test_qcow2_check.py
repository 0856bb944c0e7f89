# SPDX-License-Identifier: Apache-2.0
"""Which qcow2 images are whole: each that QEMU makes, and none of which anything is missing."""

import hashlib
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from imageserver.client.failures import Damaged
from imageserver.client.local.qcow2_chain import Chain
from imageserver.client.local.qcow2_check import require_sound
from imageserver.client.plan import KIB, MIB

SIZE = MIB + 1536
_DIRTY, _CORRUPT = 1, 2


def qemu_img(*arguments: object) -> None:
    subprocess.run(["qemu-img", *map(str, arguments)], check=True, capture_output=True)


def look(path: Path, first_source: int = 0) -> int:
    """Check an image and what it is based on; return how many those are."""
    chain = Chain.open(str(path))
    try:
        require_sound(chain, first_source)
        return len(chain.members)
    finally:
        chain.close()


def raw(path: Path, size: int = SIZE) -> Path:
    path.write_bytes(hashlib.shake_128(b"disk").digest(size))
    return path


def converted(path: Path, *options: str) -> Path:
    """Make an image whose last cluster holds the end of the disk."""
    qemu_img("convert", "-f", "raw", "-O", "qcow2", *options, raw(path.with_suffix(".raw")), path)
    return path


KINDS: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: qemu_img("create", "-f", "qcow2", path, 0),
    "new": lambda path: qemu_img("create", "-f", "qcow2", path, SIZE),
    "full": converted,
    "version 2": lambda path: converted(path, "-o", "compat=0.10"),
    "compressed": lambda path: converted(path, "-c"),
    "small clusters": lambda path: converted(path, "-o", "cluster_size=512"),
    "subclusters": lambda path: converted(path, "-o", "extended_l2=on,cluster_size=128k"),
    "preallocated": lambda path: qemu_img(
        "create", "-f", "qcow2", "-o", "preallocation=metadata", path, SIZE
    ),
    "data elsewhere": lambda path: converted(path, "-o", f"data_file={path}.data"),
    "raw data elsewhere": lambda path: converted(
        path, "-o", f"data_file={path}.data,data_file_raw=on"
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_qemu_makes_is_whole(tmp_path: Path, kind: str):
    KINDS[kind](tmp_path / "image")
    assert look(tmp_path / "image") == 1


def test_clusters_that_a_crash_has_lost_do_no_harm(tmp_path: Path):
    image = converted(tmp_path / "image")
    with image.open("ab") as file:  # the end of a write that was never noted
        file.write(bytes(200 * KIB))
    assert look(image) == 1


@pytest.mark.parametrize("kind", ["full", "version 2", "subclusters", "raw data elsewhere"])
@pytest.mark.parametrize("lost", [1, 512, 64 * KIB, MIB])
def test_what_lacks_any_byte_of_the_disk_is_found_out(tmp_path: Path, kind: str, lost: int):
    image = tmp_path / "image"
    KINDS[kind](image)
    content = tmp_path / ("image.data" if "elsewhere" in kind else "image")
    # Nothing but the last cluster lies behind the disk's end.
    end = content.read_bytes().rindex((tmp_path / "image.raw").read_bytes()[-64:]) + 64
    os.truncate(content, end)
    look(image)
    os.truncate(content, end - lost)
    with pytest.raises(Damaged) as raised:
        look(image)
    assert str(image) in str(raised.value)


def test_a_table_that_is_cut_is_found_out(tmp_path: Path):
    image = tmp_path / "image"
    qemu_img("create", "-f", "qcow2", image, 2048 * MIB)
    write = ["qemu-io", "-f", "qcow2", "-c", "write -z 1G 64k", str(image)]
    subprocess.run(write, check=True, capture_output=True)  # a table, and no data behind it
    look(image)
    os.truncate(image, image.stat().st_size - 1)
    with pytest.raises(Damaged, match=f"{image} is cut: it has .* bytes, and a table of it ends"):
        look(image)


@pytest.mark.parametrize("lost", [1, 100, 511, 512, 513, 2048, 20000])
def test_a_compressed_cluster_that_is_cut_is_found_out(tmp_path: Path, lost: int):
    image = tmp_path / "image"
    half = hashlib.shake_128(b"half").digest(40000) + bytes(2 * 64 * KIB - 40000)
    (tmp_path / "image.raw").write_bytes(bytes(MIB) + half)
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", tmp_path / "image.raw", image)
    end = len(image.read_bytes().rstrip(b"\0"))  # its last sector is padded
    os.truncate(image, end)
    look(image)
    os.truncate(image, end - lost)
    with pytest.raises(Damaged, match=f"{image} is "):
        look(image)


def test_a_table_that_is_gone_is_no_crash(tmp_path: Path):
    image = converted(tmp_path / "image")
    text = bytearray(image.read_bytes())
    first = int.from_bytes(text[40:48], "big")
    table = int.from_bytes(text[first : first + 8], "big") & 0x00FFFFFFFFFFFE00
    text[table : table + 64 * KIB] = bytes(64 * KIB)
    image.write_bytes(text)
    for first_source, what in ((0, "may be damaged"), (1, "is damaged")):
        with pytest.raises(Damaged, match=f"{image} {what}: no table names 17 of its clusters"):
            look(image, first_source)


@pytest.mark.parametrize("at", [0, 8, 16 * 8], ids=["first", "second", "last"])
def test_an_entry_that_is_gone_is_a_crash_only_where_the_image_is_written(tmp_path: Path, at: int):
    image = converted(tmp_path / "image")
    text = bytearray(image.read_bytes())
    first = int.from_bytes(text[40:48], "big")
    table = int.from_bytes(text[first : first + 8], "big") & 0x00FFFFFFFFFFFE00
    text[table + at : table + at + 8] = bytes(8)
    image.write_bytes(text)
    assert look(image, first_source=1) == 1
    with pytest.raises(Damaged, match=f"{image} may be damaged: no table names 1 of its clusters"):
        look(image)


@pytest.mark.parametrize("kind", ["full", "subclusters", "compressed"])
def test_a_disk_that_ends_before_its_clusters_is_found_out(tmp_path: Path, kind: str):
    image = tmp_path / "image"
    KINDS[kind](image)
    text = bytearray(image.read_bytes())
    text[24:32] = (SIZE // 2).to_bytes(8, "big")
    image.write_bytes(text)
    with pytest.raises(Damaged, match=f"its disk has {SIZE // 2} bytes, as its header says"):
        look(image)


@pytest.mark.parametrize(
    ("bit", "sentence"), [(_DIRTY, "is marked as dirty"), (_CORRUPT, "is marked as corrupt")]
)
def test_marks_are_believed(tmp_path: Path, bit: int, sentence: str):
    image = converted(tmp_path / "image")
    text = bytearray(image.read_bytes())
    text[79] |= bit
    image.write_bytes(text)
    with pytest.raises(Damaged, match=sentence):
        look(image)


def test_metadata_that_contradicts_itself_is_found_out(tmp_path: Path):
    image = converted(tmp_path / "image")
    text = bytearray(image.read_bytes())
    counts = int.from_bytes(text[48:56], "big")
    block = int.from_bytes(text[counts : counts + 8], "big")
    text[block + 8 : block + 16] = bytes(8)  # nobody uses four clusters in use
    image.write_bytes(text)
    with pytest.raises(
        Damaged, match=rf"{image} is damaged: qemu-img check finds \d+ errors .cluster 4 "
    ):
        look(image)


@pytest.mark.parametrize("text", [b"", b"QFI\xfb" + bytes(60), b"no image" * 100], ids=len)
def test_what_is_no_qcow2_is_called_by_its_name(tmp_path: Path, text: bytes):
    (tmp_path / "image").write_bytes(text)
    with pytest.raises(Damaged) as raised:
        look(tmp_path / "image")
    said = str(raised.value)
    assert said.startswith(f"{tmp_path}/image cannot be checked: ")
    assert ("json" in said, "/proc" in said) == (False, False)


def test_each_image_of_a_chain_is_looked_at(tmp_path: Path):
    below, top = converted(tmp_path / "below"), tmp_path / "top"
    qemu_img("create", "-f", "qcow2", "-b", below, "-F", "qcow2", top)
    assert look(top) == 2
    os.truncate(below, below.stat().st_size // 2)
    with pytest.raises(Damaged, match=f"{below} is "):
        look(top)


@pytest.mark.parametrize(("lost", "is_whole"), [(511, True), (512, False), (SIZE, False)])
def test_a_raw_base_is_as_long_as_what_is_based_on_it(tmp_path: Path, lost: int, is_whole: bool):
    base, top = raw(tmp_path / "base"), tmp_path / "top"
    qemu_img("create", "-f", "qcow2", "-b", base, "-F", "raw", top)
    os.truncate(base, SIZE - lost)
    if is_whole:
        look(top)
        return
    with pytest.raises(Damaged, match=f"{base} has {SIZE - lost} bytes, what is based on it"):
        look(top)
