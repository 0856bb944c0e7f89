# SPDX-License-Identifier: Apache-2.0
"""A qcow2 file's qemu-nbd that answers no more: nobody waits for it for ever."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from imageserver.client import qcow2
from imageserver.client.errors import LocalFailure
from imageserver.client.plan import MIB
from imageserver.client.qcow2 import Qcow2

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
    monkeypatch.setattr(qcow2, "_END_SECONDS", 1)
    stop(image)
    began = time.monotonic()
    with pytest.raises(LocalFailure, match="qemu-nbd does not answer"):
        image.sync(1)
    with pytest.raises(LocalFailure, match="qemu-nbd does not answer"):
        image.close()
    assert_gone(image, began)


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
