# SPDX-License-Identifier: Apache-2.0
"""A qcow2 file's qemu-nbd: it opens what was looked at, and nobody waits for it for ever."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from imageserver.client.failures import InUse, LocalFailure
from imageserver.client.local import qcow2
from imageserver.client.local.qcow2 import Qcow2
from imageserver.client.local.qcow2_chain import Chain
from imageserver.client.local.qcow2_check import require_sound
from imageserver.client.plan import MIB

#: Much less than an end may take otherwise.
_AT_ONCE_SECONDS = 10


@pytest.fixture
def image(tmp_path: Path) -> Iterator[Qcow2]:
    image = Qcow2.create(str(tmp_path / "image"), 64 * MIB, 1)
    yield image
    image.abandon()


def stop(image: Qcow2) -> int:
    os.kill(image._server.pid, signal.SIGSTOP)
    return image._server.pid


def assert_gone(image: Qcow2, began: float) -> None:
    assert image._server.returncode == -signal.SIGKILL
    assert time.monotonic() - began < _AT_ONCE_SECONDS


def test_what_is_written_reads_back(image: Qcow2):
    data = os.urandom(3 * MIB)
    image.write(MIB, data)
    image.zero(2 * MIB, 2 * MIB + 4096)
    image.sync()
    assert image.read(MIB, 3 * MIB) == data[:MIB] + bytes(4096) + data[MIB + 4096 :]
    image.close()
    assert image._server.returncode == 0


def test_a_bounded_sync_and_the_end_give_up(image: Qcow2, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(qcow2, "END_SECONDS", 1)
    stop(image)
    began = time.monotonic()
    with pytest.raises(LocalFailure, match="qemu-nbd does not answer"):
        image.sync(1)
    with pytest.raises(LocalFailure, match="qemu-nbd does not answer"):
        image.close()
    assert_gone(image, began)


def test_a_sync_that_has_failed_fails_for_good(image: Qcow2, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as silent:
        silent.setattr(image, "_wait", _fail)
        with pytest.raises(LocalFailure, match="lost some"):
            image.sync()
    with pytest.raises(LocalFailure, match="what was written before is lost"):
        image.sync()


def _fail(*_: object, **__: object) -> None:
    raise LocalFailure("lost some")


def test_ctrl_c_ends_each_wait(image: Qcow2):
    stop(image)
    began = time.monotonic()
    for wait in (image.sync, lambda: image.read(0, 512), image.close):
        interrupt = threading.Timer(0.2, signal.raise_signal, [signal.SIGINT])
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            wait()
        interrupt.join()
    assert_gone(image, began)


def test_threads_that_write_stop_when_all_ends(image: Qcow2):
    stop(image)
    began, failed = time.monotonic(), []

    def write() -> None:
        with pytest.raises(LocalFailure) as caught:
            image.write(0, bytes(16 * MIB))
        failed.append(str(caught.value))

    writer = threading.Thread(target=write)
    writer.start()
    image.abandon()
    writer.join(_AT_ONCE_SECONDS)
    assert len(failed) == 1
    assert_gone(image, began)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An overlay of a raw base, an image on its own, and a secret that both might name."""
    (tmp_path / "base").write_bytes(b"b" * MIB)
    (tmp_path / "secret").write_bytes(b"s" * MIB)
    for name, *named in (
        ("overlay", "-b", "base", "-F", "raw"),
        ("alone",),
        ("evil", "-b", "secret", "-F", "raw"),
        ("worse", "-o", f"data_file={tmp_path}/secret,data_file_raw=on"),
    ):
        size = [str(MIB)] if "-b" not in named else []
        command = ["qemu-img", "create", "-q", "-f", "qcow2", *named, name, *size]
        subprocess.run(command, check=True, cwd=tmp_path)
    (tmp_path / "secret").write_bytes(b"s" * MIB)
    return tmp_path


@pytest.mark.parametrize("name", ["alone", "overlay"])
def test_an_image_that_is_put_in_anothers_place_is_refused(folder: Path, name: str):
    chain = Chain.open(str(folder / name))
    (folder / "evil").rename(folder / name)
    with pytest.raises(LocalFailure, match=f"{name} was changed while it was opened"):
        Qcow2(chain, 1, writable=False)


def test_a_base_that_is_put_in_anothers_place_is_not_opened(folder: Path):
    chain = Chain.open(str(folder / "overlay"))
    (folder / "secret").rename(folder / "base")
    image = Qcow2(chain, 1, writable=False)
    try:
        assert image.read(0, 512) == b"b" * 512
    finally:
        image.close()


@pytest.mark.parametrize("evil", ["evil", "worse"])
@pytest.mark.parametrize("name", ["alone", "overlay"])
def test_a_header_that_is_rewritten_names_nothing(folder: Path, name: str, evil: str):
    chain = Chain.open(str(folder / name))
    (folder / name).write_bytes((folder / evil).read_bytes())
    with pytest.raises(LocalFailure, match=f"{name} was changed while it was opened"):
        Qcow2(chain, 1, writable=False)
    assert chain.members == []


def test_what_is_written_or_cut_while_it_is_read_is_found_out(folder: Path):
    image = Qcow2(Chain.open(str(folder / "overlay")), 1, writable=False)
    try:
        image.require_unchanged()
        os.truncate(folder / "base", 512)
        with pytest.raises(LocalFailure, match="base was changed while it was read"):
            image.require_unchanged()
    finally:
        image.close()


def test_an_image_that_is_being_written_is_in_use(image: Qcow2):
    chain = Chain.open(image.path)
    try:
        with pytest.raises(LocalFailure) as raised:
            require_sound(chain)
    finally:
        chain.close()
    sentence = f"{image.path} is being written by another program, as its lock tells"
    assert (type(raised.value), str(raised.value)) == (InUse, sentence)


def test_temporary_files_may_lie_deep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    image = Qcow2.create(str(tmp_path / "image"), MIB, 1)
    assert image.read(0, 512) == bytes(512)
    image.close()
    assert list(deep.iterdir()) == []


@pytest.mark.parametrize("is_hidden", [True, False])
def test_a_module_that_is_hidden_is_told_from_one_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_hidden: bool
):
    monkeypatch.setattr(qcow2, "_HAS_LIBNBD", False)
    monkeypatch.setattr(sys, "prefix", "/venv" if is_hidden else sys.base_prefix)
    with pytest.raises(LocalFailure, match="install python3-libnbd") as raised:
        Qcow2.create(str(tmp_path / "image"), MIB, 1)
    assert ("--system-site-packages" in str(raised.value)) == is_hidden


def test_an_image_in_use_is_said_to_be(image: Qcow2):
    """The state of a download is kept then: its qemu-nbd may outlive a run for a moment."""
    with pytest.raises(InUse, match="is in use by another program, as its lock tells"):
        Qcow2(Chain.open(image.path, writable=True), 1, writable=True)


def test_a_qemu_nbd_that_nobody_has_connected_to_ends_with_imagectl(tmp_path: Path):
    """By itself it would wait for its first client for ever, and hold the image's lock."""
    program = (
        "import os, signal, sys\n"
        "from imageserver.client.local.qcow2 import Qcow2\n"
        "Qcow2._connect = lambda image, _: print(image._server.pid, flush=True) or "
        "os.kill(os.getpid(), signal.SIGKILL)\n"
        "Qcow2.create(sys.argv[1], 1 << 20, 1)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "image")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    deadline = time.monotonic() + _AT_ONCE_SECONDS

    assert done.returncode == -signal.SIGKILL
    while _is_running(int(done.stdout)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _is_running(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="ascii")
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"  # which nobody has reaped
