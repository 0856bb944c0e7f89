# SPDX-License-Identifier: Apache-2.0
"""The state that files are opened in, of both kinds: what has validators, what has changed."""

import errno
import os
from contextlib import closing
from pathlib import Path

import pytest

from imageserver.backends.file import state
from imageserver.backends.file.image import ImageFiles
from imageserver.backends.file.kind import FILE, RAW, FileImage
from imageserver.backends.file.raw import RawFiles
from imageserver.core.errors import FileAccessError
from imageserver.core.kinds import ImageKind
from imageserver.core.ports import Backend, Intent

OPENERS = {FILE: ImageFiles(4096), RAW: RawFiles(4096)}
kinds = pytest.mark.parametrize("kind", [FILE, RAW], ids=lambda kind: kind.name)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(b"old")
    return path


def opened(kind: ImageKind, path: Path, intent: Intent = Intent.READ) -> Backend:
    parsed = kind.parse({"file": str(path), "format": "raw" if kind is RAW else None})
    assert isinstance(parsed, FileImage)
    backend: Backend = OPENERS[kind].open(parsed, intent)
    return backend


@kinds
def test_a_file_has_a_tag_when_its_last_change_is_long_enough_ago(
    monkeypatch: pytest.MonkeyPatch, image: Path, kind: ImageKind
) -> None:
    found = []
    for now in (image.stat().st_ctime_ns, 1 << 62):
        monkeypatch.setattr(state.time, "time_ns", lambda now=now: now)
        backend = opened(kind, image)
        found.append(backend.info.state)
        backend.close()

    assert [bool(each and each.etag) for each in found] == [False, True]
    assert {each and each.modified for each in found} == {image.stat().st_mtime_ns // 10**9}


def test_a_file_that_is_to_be_made_has_no_state(tmp_path: Path) -> None:
    backend = opened(FILE, tmp_path / "new", Intent.REPLACE)

    assert backend.info.state is None
    backend.close()


@kinds
def test_a_file_is_changed_by_writes_and_not_by_what_takes_its_place(
    image: Path, tmp_path: Path, kind: ImageKind
) -> None:
    backend = opened(kind, image)
    image.chmod(0o640)
    (tmp_path / "other").write_bytes(b"new")
    (tmp_path / "old").hardlink_to(image)
    (tmp_path / "other").rename(image)
    assert backend.is_unchanged()
    with (tmp_path / "old").open("ab") as file:
        file.write(b"more")
    assert not backend.is_unchanged()
    backend.close()


@kinds
def test_where_it_cannot_be_told_whether_a_file_has_changed_the_error_is_ours(
    image: Path, monkeypatch: pytest.MonkeyPatch, kind: ImageKind
) -> None:
    def fail(_fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with closing(opened(kind, image)) as backend, monkeypatch.context() as patched:
        patched.setattr(os, "fstat", fail)
        with pytest.raises(FileAccessError, match="Input/output error"):
            backend.is_unchanged()
