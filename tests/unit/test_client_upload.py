# SPDX-License-Identifier: Apache-2.0
"""imagectl upload: late requests do no harm; a map of zeros counts only if it is the image's."""

import contextlib
from collections.abc import Generator
from pathlib import Path

import pytest

from imageserver.client.access import Access
from imageserver.client.errors import Broken, Different
from imageserver.client.progress import Silent
from imageserver.client.remote import Extent, Remote
from imageserver.client.upload import Wanted, upload
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
    assert (result.size, result.verified, result.zeroed > 0) == (SIZE, True, True)


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
