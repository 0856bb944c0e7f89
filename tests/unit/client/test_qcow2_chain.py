# SPDX-License-Identifier: Apache-2.0
"""What qcow2 headers name, and chains that are followed by them."""

import contextlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imageserver.client.failures import LocalFailure
from imageserver.client.local.qcow2_chain import Chain
from imageserver.client.local.qcow2_header import Header, parse_header

FORMAT, FEATURES, END = 0xE2792ACA, 0x6803F857, 0


def header(name: bytes, *extensions: tuple[int, bytes], version: int = 3, features: int = 0):
    """Write a header with these extensions, the name of a backing file behind them."""
    said = b"".join(
        kind.to_bytes(4, "big") + len(text).to_bytes(4, "big") + text + bytes(-len(text) % 8)
        for kind, text in extensions
    )
    length = 72 if version == 2 else 104
    head = bytearray(length)
    head[:8] = b"QFI\xfb" + version.to_bytes(4, "big")
    head[8:16] = (length + len(said)).to_bytes(8, "big")
    head[16:20] = len(name).to_bytes(4, "big")
    if version != 2:
        head[72:80] = features.to_bytes(8, "big")
        head[100:104] = length.to_bytes(4, "big")
    return bytes(head) + said + name


def follow(path: str) -> None:
    """Open an image and all that it is based on."""
    Chain.open(path).close()


def named(head: bytes) -> tuple[str | None, str | None, bool]:
    """Return what a header names: a backing file, its format, whether there is a data file."""
    found = parse_header(head)
    return found.backing, found.format, found.has_data_file


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize(
    ("extensions", "found"),
    [
        ([], None),
        ([(FORMAT, b"raw")], "raw"),
        ([(FEATURES, bytes(384)), (FORMAT, b"qcow2"), (END, b"")], "qcow2"),
        ([(FORMAT, b"raw"), (FORMAT, b"")], ""),
        ([(FORMAT, b"\0raw")], ""),
        ([(FORMAT, b"raw\0qcow2")], "raw"),
        ([(FORMAT, b"r" * 16)], None),
        ([(END, b""), (FORMAT, b"raw")], None),
    ],
    ids=["none", "one", "among others", "the last", "empty", "cut", "too long", "behind the end"],
)
def test_a_format_is_what_qemu_takes_for_it(version, extensions, found):
    text = header(b"base\0x", *extensions, version=version)
    assert named(text + bytes(100)) == ("base", found, False)


def test_a_longer_extension_than_there_is_room_for_is_damage():
    text = header(b"base", (FORMAT, b"raw"), (FEATURES, b"x" * 8))
    damaged = text.replace(b"\0\0\0\x08x", b"\0\0\0\x09x")
    assert named(damaged) == ("base", None, False)


def test_a_data_file_is_told():
    assert parse_header(header(b"", features=1 << 2)).has_data_file
    assert not parse_header(header(b"", features=1 << 2, version=2)).has_data_file


def test_encrypted_images_of_a_chain_get_the_passphrase_and_others_none(tmp_path: Path):
    luks = bytearray(header(b"base", (FORMAT, b"qcow2")))
    luks[32:36] = (2).to_bytes(4, "big")
    (tmp_path / "top").write_bytes(luks)
    (tmp_path / "base").write_bytes(header(b""))
    chain = Chain.open(str(tmp_path / "top"), secret_file="/a,b")  # noqa: S106 - a path
    with contextlib.closing(chain):
        top = chain.node()
    assert top["encrypt"] == {"format": "luks", "key-secret": "key0"}
    assert "encrypt" not in top["backing"]
    assert chain.objects == ["--object", "secret,id=key0,file=/a,,b"]


@given(st.binary(max_size=200))
def test_no_header_is_too_strange(text):
    if text[:4] != b"QFI\xfb":
        assert parse_header(text) == Header()
    parse_header(b"QFI\xfb" + text)
    assert named(header(b"base", (FORMAT, b"raw"))[:104] + text)[0] is not None


@pytest.mark.parametrize(
    ("name", "is_followed"),
    [
        (b"below", True),
        (b"./below", True),
        (b"../dir/below", True),
        (b"file:below", False),  # from where imagectl was started
        (b"file:dir/below", True),
        (b"./a:b/../below", True),
        (b"nbd:below", False),
        (b'json:{"driver":"file","filename":"dir/below"}', False),
    ],
    ids=repr,
)
def test_what_qemu_takes_for_a_path_is_followed(
    name: bytes, is_followed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "dir" / "a:b").mkdir(parents=True)
    (tmp_path / "dir" / "below").write_bytes(header(b"x"))
    (tmp_path / "below").write_bytes(header(b""))
    (tmp_path / "dir" / "top").write_bytes(header(name, (FORMAT, b"qcow2")))
    monkeypatch.chdir(tmp_path)
    if is_followed:
        with pytest.raises(LocalFailure, match="below has the backing file 'x', but does not"):
            follow("dir/top")
    else:
        follow("dir/top")


def test_a_link_is_where_it_lies(tmp_path: Path):
    for folder, text in (("here", header(b"x")), ("there", header(b""))):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "below").write_bytes(text)
    (tmp_path / "there" / "top").write_bytes(header(b"below", (FORMAT, b"qcow2")))
    (tmp_path / "here" / "top").symlink_to("../there/top")
    follow(str(tmp_path / "there" / "top"))
    with pytest.raises(LocalFailure, match="here/below has the backing file 'x'"):
        follow(str(tmp_path / "here" / "top"))


@pytest.mark.parametrize("fmt", [b"vmdk", b"qcow", b"nbd", b"\xff"])
def test_other_formats_are_refused(tmp_path: Path, fmt: bytes):
    (tmp_path / "top").write_bytes(header(b"below", (FORMAT, fmt)))
    with pytest.raises(LocalFailure, match="only raw and qcow2 are followed"):
        follow(str(tmp_path / "top"))


def test_a_raw_image_is_not_looked_into(tmp_path: Path):
    (tmp_path / "below").write_bytes(header(b"secret"))
    (tmp_path / "top").write_bytes(header(b"below", (FORMAT, b"raw")))
    follow(str(tmp_path / "top"))
    (tmp_path / "top").write_bytes(header(b"below", (FORMAT, b"qcow2")))
    with pytest.raises(LocalFailure, match="does not record its format"):
        follow(str(tmp_path / "top"))


def test_a_missing_image_is_named(tmp_path: Path):
    (tmp_path / "top").write_bytes(header(b"below", (FORMAT, b"qcow2")))
    with pytest.raises(LocalFailure, match="below: No such file"):
        follow(str(tmp_path / "top"))


def test_messages_hold_no_control_characters(tmp_path: Path):
    strange = os.fsencode(tmp_path) + b"/\x1b[2J\xff"
    Path(os.fsdecode(strange)).write_bytes(header(b"\x1b[2J\xff"))
    (tmp_path / "top").write_bytes(header(strange, (FORMAT, b"qcow2")))
    with pytest.raises(LocalFailure) as raised:
        follow(str(tmp_path / "top"))
    assert str(raised.value).isprintable()
