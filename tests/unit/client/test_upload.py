# SPDX-License-Identifier: Apache-2.0
"""imagectl upload: late requests do no harm; a map of zeros counts only if it is the image's."""

import contextlib
import os
import subprocess
from collections.abc import Generator, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from imageserver.client.failures import Broken, Busy, Different, Failed, GaveUp, LocalFailure
from imageserver.client.http.access import Access
from imageserver.client.http.answers import Abilities
from imageserver.client.http.remote import Extent, Remote
from imageserver.client.moving import upload as module
from imageserver.client.moving.upload import Wanted, upload
from imageserver.client.showing.progress import Silent
from tests.unit import liars

#: Larger than what is compared although it need not be: gaps of 256 KiB.
SIZE, ZEROS = 2048 * liars.KIB, (512 * liars.KIB, 1536 * liars.KIB)


class _Unzeroed(Remote):
    """Zeros nothing, and calls all of an image of another size zero."""

    mapped = SIZE

    def zero(self, start: int, stop: int) -> None:
        self.write(start, stop, [b"x" * (stop - start)])

    def extents(self, context: str = "zero") -> Generator[Extent]:
        assert context == "zero"
        yield 0, self.mapped, True, False


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(liars, "SIZE", SIZE)
    monkeypatch.setattr(liars, "ZEROS", ZEROS)
    path = tmp_path / "image.raw"
    with path.open("wb") as image:
        image.write(b"d" * ZEROS[0])
        image.seek(ZEROS[1])
        image.write(b"d" * (SIZE - ZEROS[1]))
    return str(path)


@pytest.mark.parametrize("mapped", [SIZE - 4096, SIZE + 4096])
def test_a_map_of_another_size_hides_nothing(file: str, mapped: int):
    with liars.liar("") as url, contextlib.closing(_Unzeroed(Access(url))) as remote:
        remote.mapped = mapped
        with pytest.raises(Different):
            upload(remote, Wanted(file, verify=True), Silent())


def test_an_honest_map_is_believed(file: str):
    with liars.liar("") as url, contextlib.closing(Remote(Access(url))) as remote:
        result = upload(remote, Wanted(file, verify=True), Silent())
    assert (result.size, result.verified_by, result.zeroed > 0) == (SIZE, "reading", True)


class _Late(Remote):
    """Its first zero request is given up, and done when ``catch_up`` is called."""

    late: tuple[int, int] | None = None

    def zero(self, start: int, stop: int) -> None:
        if self.late is None:
            self.late = start, stop
            raise Broken("silent for too long")
        super().zero(start, stop)

    def catch_up(self) -> None:
        assert self.late is not None
        super().zero(*self.late)


def test_a_zero_request_that_is_done_late_wipes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    holes, block = 300, 64 * liars.KIB
    monkeypatch.setattr(liars, "SIZE", 2 * holes * block)
    file = tmp_path / "image.raw"
    with file.open("wb") as image:
        image.truncate(2 * holes * block)
        for hole in range(holes):
            image.seek(2 * hole * block)
            image.write(b"d" * block)
    with liars.liar("") as url, contextlib.closing(_Late(Access(url))) as remote:
        result = upload(remote, Wanted(str(file)), Silent())
        remote.catch_up()
        served = b"".join(map(bytes, remote.read(0, result.size)))
    assert (result.data, result.zeroed) == (holes * block, holes * block)
    assert served == file.read_bytes()


def test_a_write_that_was_given_up_may_have_been_done(file: str):
    class _GivesUp(Remote):
        def write(self, *arguments: Any, **more: Any) -> None:
            super().write(*arguments, **more)
            raise GaveUp("answered PUT with 504")

    with (
        liars.liar("") as url,
        contextlib.closing(_GivesUp(Access(url))) as remote,
        pytest.raises(GaveUp, match="504; the image on the server may be part old, part new"),
    ):
        upload(remote, Wanted(file, patience_seconds=0), Silent())


def test_a_zero_request_that_was_given_up_may_have_been_done(file: str):
    answers = [GaveUp("answered PATCH with 504")]

    class _GivesUp(Remote):
        def zero(self, start: int, stop: int) -> None:
            raise answers.pop() if answers else Busy("answered PATCH with 409")

    with (
        liars.liar("") as url,
        contextlib.closing(_GivesUp(Access(url))) as remote,
        pytest.raises(Busy, match="409; the image on the server may be part old, part new"),
    ):
        upload(remote, Wanted(file, patience_seconds=0.3), Silent())


@pytest.mark.parametrize(("failures", "size"), [(1, 2 * SIZE), (3, SIZE)])
def test_padding_asks_again_for_the_size_of_what_may_be_missing(
    file: str, monkeypatch: pytest.MonkeyPatch, failures: int, size: int
):
    class _Failing(Remote):
        answers = [Failed("500")] * failures

        def abilities(self) -> Abilities:
            return replace(super().abilities(), methods=frozenset(("GET", "PUT")))

        def size(self) -> int:
            if self.answers:
                raise self.answers.pop()
            return 2 * SIZE if not sent else sent[0]

        def put(self, size: int, body: Iterable[bytes], **_: object) -> bool:
            assert sum(map(len, body)) == size
            sent.append(size)
            return True

    monkeypatch.setattr(module, "_PAD_WAITS", (0.0, 0.0))
    sent: list[int] = []
    with liars.liar("") as url, contextlib.closing(_Failing(Access(url))) as remote:
        upload(remote, Wanted(file, pad=True), Silent())
    assert sent == [size]


ODD = 300 * liars.KIB + 100


def restored(image: Path, *, size: int = ODD) -> bytes:
    """Upload a qcow2 image to a disk of this size; return what is there."""
    wanted = Wanted(str(image), format="qcow2", backing=True, verify=True)
    with liars.liar("") as url, contextlib.closing(Remote(Access(url))) as remote:
        assert upload(remote, wanted, Silent()).size == size
        return b"".join(map(bytes, remote.read(0, size)))


def qemu_img(*arguments: object) -> None:
    subprocess.run(["qemu-img", *map(str, arguments)], check=True, capture_output=True)


@pytest.mark.parametrize("is_overlay", [False, True], ids=["full", "incremental"])
def test_an_image_of_no_whole_sectors_is_restored_from_qcow2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_overlay: bool
):
    monkeypatch.setattr(liars, "SIZE", ODD)
    raw, image = tmp_path / "raw", tmp_path / "image"
    raw.write_bytes(b"d" * ODD)
    if is_overlay:
        qemu_img("create", "-f", "qcow2", "-b", raw, "-F", "raw", image)
    else:
        qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, image)
    assert restored(image) == raw.read_bytes()


@pytest.mark.parametrize("tail", [b"\0" * 512, b"x"], ids=["a sector", "no zeros"])
def test_an_image_that_is_larger_than_the_disk_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tail: bytes
):
    monkeypatch.setattr(liars, "SIZE", ODD)
    raw, image = tmp_path / "raw", tmp_path / "image"
    raw.write_bytes(b"d" * ODD + tail)
    qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, image)
    with pytest.raises(LocalFailure, match=f"bytes, more than the image's {ODD}"):
        restored(image)


def test_a_file_that_is_cut_while_it_is_sent_is_not_uploaded(file: str):
    class _Cutting(Remote):
        def zero(self, start: int, stop: int) -> None:
            os.truncate(file, 0)
            super().zero(start, stop)

    with (
        liars.liar("") as url,
        contextlib.closing(_Cutting(Access(url))) as remote,
        pytest.raises(LocalFailure, match="has become shorter than"),
    ):
        upload(remote, Wanted(file), Silent())


def test_an_image_that_is_cut_while_it_is_sent_is_not_uploaded(file: str, tmp_path: Path):
    image = tmp_path / "image"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", file, image)

    class _Cutting(Remote):
        def zero(self, start: int, stop: int) -> None:
            os.truncate(image, 4096)
            super().zero(start, stop)

    with (
        liars.liar("") as url,
        contextlib.closing(_Cutting(Access(url))) as remote,
        pytest.raises(LocalFailure, match="image was changed while it was read; the image"),
    ):
        upload(remote, Wanted(str(image), format="qcow2"), Silent())
