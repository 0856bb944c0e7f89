# SPDX-License-Identifier: Apache-2.0
"""What ``share`` refuses is one sentence, and nothing has been started or made."""

import argparse
import os
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from imageserver.server.startup import read_settings
from imageserver.sharing import command
from imageserver.sharing.command import Server, add_arguments, share
from imageserver.sharing.image_lock import hold
from imageserver.sharing.sources import refusal


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory to be in; nothing may be started, and no temporary file be left."""

    def started(*_arguments: object, **_options: object) -> None:
        raise AssertionError("something was started")

    monkeypatch.setattr(command, "NbdServer", started)
    monkeypatch.setattr(command, "ImageServer", started)
    monkeypatch.chdir(tmp_path)
    with tempfile.TemporaryDirectory(prefix="is-") as temporary:  # short: sockets' paths are
        monkeypatch.setattr("tempfile.tempdir", temporary)
        yield Path(temporary)


def shared(*words: str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return share(parser.parse_args(words), Server(read_settings, lambda _settings: None))


def qemu_img(*arguments: object) -> None:
    subprocess.run(["qemu-img", *map(str, arguments)], check=True, capture_output=True)


def raw(name: str = "disk.raw", head: bytes = b"", size: int = 65536) -> str:
    Path(name).write_bytes(head.ljust(size, b"\0"))
    return name


def qcow2(name: str = "disk.qcow2", *more: object) -> str:
    qemu_img("create", "-f", "qcow2", *more, name, "1M")
    return name


def with_bitmap() -> str:
    name = qcow2()
    qemu_img("bitmap", "--add", name, "monday")
    return name


def encrypted() -> str:
    name = qcow2()
    with open(name, "r+b") as file:
        file.seek(32)
        file.write((2).to_bytes(4, "big"))
    return name


def overlay() -> str:
    name = raw()
    os.truncate(name, 1 << 20)
    return qcow2("top", "-b", name, "-F", "raw")


def cut() -> str:
    name = qcow2()
    os.truncate(name, 4096)
    return name


@pytest.mark.parametrize(
    ("file", "words", "said"),
    [
        (lambda: "none.raw", [], "none.raw: No such file or directory."),
        (lambda: "/", [], "/ is neither a file nor a block device."),
        (raw, ["--format", "qcow2"], "disk.raw is not qcow2: by its header it is raw."),
        (qcow2, ["--format", "vdi"], "disk.qcow2 is not vdi: by its header it is qcow2."),
        (lambda: raw(head=b"KDMV"), [], "disk.raw looks like VMDK, which is not shared: "),
        (raw, ["--bitmap", "x"], "disk.raw has no bitmap 'x': it has none."),
        (with_bitmap, ["--bitmap", "x"], "disk.qcow2 has no bitmap 'x': it has monday."),
        (cut, [], "disk.qcow2 is damaged: qemu-img check finds 3 errors (counting reference "),
        (encrypted, [], "disk.qcow2 is encrypted (LUKS): --secret-file names "),
        (encrypted, ["--secret-file", "none"], "none: No such file or directory."),
        (lambda: "https://host/disk", [], "https://host/disk is no file here: --allow-remote "),
        (
            lambda: qcow2("top", "-u", "-b", "nbd://host/x", "-F", "raw"),
            [],
            "top is based on 'nbd://host/x', which is no path and cannot be checked: ",
        ),
        (
            lambda: qcow2("top", "-u", "-b", 'json:{"driver":"null-co"}', "-F", "raw"),
            [],
            'top is based on \'json:{"driver":"null-co"}\', which is no path ',
        ),
        (raw, ["disk.raw"], "disk.raw is disk.raw once more: name each image once."),
        (overlay, ["disk.raw"], "top is based on disk.raw: what is written to that would "),
        (raw, ["--bind", "host:port"], "--bind 'host:port' is wrong: it must be HOST, "),
    ],
)
def test_what_cannot_be_shared_is_one_sentence(
    file: Callable[[], str],
    words: list[str],
    said: str,
    place: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert shared(file(), *words) == 5

    output, errors = capsys.readouterr()
    assert errors.startswith(f"imageserver: {said}")
    assert (output, errors.count("\n"), list(place.iterdir())) == ("", 1, [])


def test_a_port_in_use_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert shared(raw(), "--bind", f"127.0.0.1:{port}") == 5

    errors = capsys.readouterr().err
    assert errors.startswith(f"imageserver: cannot listen at 127.0.0.1:{port} (Address already ")


def test_a_missing_qemu_nbd_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = qcow2()
    monkeypatch.setattr("shutil.which", lambda _name, **_more: None)

    assert shared(name) == 5
    assert capsys.readouterr().err.startswith("imageserver: qemu-nbd is missing: ")


@pytest.mark.parametrize(
    ("image", "said"), [(qcow2, "being written"), (raw, "in use")], ids=["qcow2", "raw"]
)
def test_an_image_in_use_is_one_sentence(
    image: Callable[[], str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = image()
    with open(name, "r+b") as writer:
        assert hold(writer.fileno(), writable=True)
        assert shared("--read-only", name) == 5

    errors = capsys.readouterr().err
    assert errors == f"imageserver: {name} is {said} by another program, as its lock tells.\n"


def test_an_image_that_another_program_only_reads_can_be_shared_read_only(
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = raw()
    with open(name, "rb") as reader:
        assert hold(reader.fileno(), writable=False)
        assert shared(name) == 5

    told = f"{name} is read by another program, as its lock tells: --read-only shares it"
    assert capsys.readouterr().err == f"imageserver: {told}.\n"
    by_qemu = refusal(name, 'Failed to get "write" lock', {}, could_be_read=True)
    assert str(by_qemu) == told


def test_a_file_that_cannot_be_written_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.access", lambda _path, mode: mode != os.W_OK)

    assert shared(raw()) == 5
    told = "disk.raw cannot be written: --read-only shares it for reading."
    assert capsys.readouterr().err == f"imageserver: {told}\n"
