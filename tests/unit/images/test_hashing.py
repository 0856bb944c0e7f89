# SPDX-License-Identifier: Apache-2.0
"""Bodies hashed while they are written: on the spot or on a thread, whatever the buffers do."""

import hashlib
import threading
from collections.abc import Iterator

import pytest

from imageserver.core.digests import Expected
from imageserver.core.errors import DigestMismatch
from imageserver.images import hashing
from imageserver.images.hashing import LONG, Hashed
from tests.unit.fakes import Bytes
from tests.unit.shortages import no_threads

DATA = bytes(range(256)) * (LONG // 128)


def expected(data: bytes, algorithm: str = "sha-256", header: str = "Content-Digest") -> Expected:
    made = {"sha-256": hashlib.sha256, "sha-512": hashlib.sha512}[algorithm](data)
    return Expected(header, algorithm, made.digest())


@pytest.fixture(autouse=True)
def _no_thread_stays() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "hash"]


def read_through(body: Hashed, *buffers: bytearray) -> bytes:
    """Fill the buffers in turn, as a ring does, until the body has ended."""
    came = bytearray()
    while True:
        for buffer in buffers:
            view, filled = memoryview(buffer), 0
            while filled < len(view) and (count := body.readinto(view[filled:])):
                filled += count
            came += view[:filled]
            if filled < len(view):
                return bytes(came)


@pytest.mark.parametrize("length", [0, 1, 1000, LONG - 1, LONG, len(DATA)])
@pytest.mark.parametrize("algorithm", ["sha-256", "sha-512"])
@pytest.mark.parametrize("buffers", [1, 3])
def test_a_body_that_matches_passes(length: int, algorithm: str, buffers: int) -> None:
    data = DATA[:length]
    body = Hashed(Bytes(data, 100_001), length, [expected(data, algorithm)])

    assert read_through(body, *(bytearray(1 << 18) for _ in range(buffers))) == data
    body.verify()
    body.close()
    body.close()


@pytest.mark.parametrize("length", [0, 1000, LONG])
def test_a_body_that_does_not_match_fails_by_the_name_of_the_field(length: int) -> None:
    data = DATA[:length]
    fields = [expected(data), expected(b"other", "sha-512", "Repr-Digest")]
    body = Hashed(Bytes(data, 100_001), length, fields)
    read_through(body, bytearray(4096))

    with pytest.raises(DigestMismatch, match="body does not match its Repr-Digest") as caught:
        body.verify(7)
    body.close()
    assert caught.value.written == 7


def test_a_buffer_is_not_filled_anew_before_it_is_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = _Slow(monkeypatch)
    body = Hashed(Bytes(DATA, LONG // 4), len(DATA), [expected(DATA)])
    buffer = bytearray(LONG // 2)
    # The second call goes on where the first one has ended, and need not wait.
    assert body.readinto(memoryview(buffer)) == LONG // 4
    assert body.readinto(memoryview(buffer)[LONG // 4 :]) == LONG // 4
    reading = threading.Thread(target=body.readinto, args=(memoryview(buffer),))
    reading.start()
    reading.join(0.1)
    is_waiting = reading.is_alive()
    hashes.may_go.set()
    reading.join(10)
    read_through(body, buffer)
    body.verify()
    body.close()

    assert is_waiting


def test_a_body_is_all_hashed_when_its_last_byte_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = _Slow(monkeypatch)
    body = Hashed(Bytes(DATA[:LONG], LONG), LONG, [expected(DATA[:LONG])])
    buffer = bytearray(LONG)
    threading.Timer(0.05, hashes.may_go.set).start()
    body.readinto(memoryview(buffer))
    buffer[:] = bytes(LONG)  # it is somebody else's now
    body.verify()
    body.close()


def test_a_body_that_breaks_off_leaves_no_thread() -> None:
    body = Hashed(Bytes(DATA[:1000]), LONG, [expected(DATA)])
    read_through(body, bytearray(100))
    body.close()


def test_a_long_body_is_hashed_where_the_system_has_no_thread() -> None:
    with no_threads():
        body = Hashed(Bytes(DATA, 100_001), len(DATA), [expected(DATA)])
    read_through(body, bytearray(1 << 18))
    body.verify()


def test_nobody_waits_for_a_hash_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    hashes = _Slow(monkeypatch, MemoryError())
    hashes.may_go.set()
    body = Hashed(Bytes(DATA[:LONG], LONG // 2), LONG, [expected(DATA[:LONG])])
    assert read_through(body, bytearray(LONG // 2)) == DATA[:LONG]
    with pytest.raises(DigestMismatch):
        body.verify()
    body.close()


class _Slow:
    """Makes hashes wait until they may go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> None:
        self.may_go = threading.Event()
        self._error = error
        monkeypatch.setattr(hashing.hashlib, "new", lambda _name: self)
        self._hash = hashlib.sha256()
        self.digest = self._hash.digest

    def update(self, data: memoryview) -> None:
        assert self.may_go.wait(10)
        if self._error:
            raise self._error
        self._hash.update(data)
