# SPDX-License-Identifier: Apache-2.0
"""The config directory: what is known, for how long it is remembered, and what is reported."""

import errno
import logging
import os
from pathlib import Path

import pytest

from imageserver.backends.file.kind import FileImage
from imageserver.core.errors import Exhausted, StateUnavailable
from imageserver.core.kinds import Kinds
from imageserver.core.transfer import Transfer
from imageserver.observability import logs
from imageserver.transfers import files
from tests.unit.logged import told
from tests.unit.places import NOW, OLD, SECOND, A, B, Place
from tests.unit.shortages import no_descriptors


@pytest.fixture
def place(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Place:
    caplog.set_level(logging.WARNING, "imageserver.transfers.files")
    return Place(tmp_path, caplog)


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the ids that are parsed, in order."""
    ids: list[str] = []
    real = files.parse_transfer

    def parse(transfer_id: str, text: bytes, kinds: Kinds) -> Transfer:
        ids.append(transfer_id)
        return real(transfer_id, text, kinds)

    monkeypatch.setattr(files, "parse_transfer", parse)
    return ids


# What is known


def test_a_file_is_a_transfer_named_by_its_name(place: Place) -> None:
    place.put("t", '{"backend":"file","file":"/images/a","read_only":true}')

    changed_ns = (place.path / "t").stat().st_ctime_ns
    assert place.registry.get("t") == Transfer(
        "t", FileImage("/images/a"), read_only=True, changed_ns=changed_ns
    )


@pytest.mark.parametrize("free", [0, 1], ids=["directory", "file"])
def test_a_transfer_whose_file_finds_no_descriptor_is_not_called_unknown(
    place: Place, caplog: pytest.LogCaptureFixture, free: int
) -> None:
    place.put("t", A)

    with no_descriptors(free), pytest.raises(Exhausted):
        place.registry.get("t")
    assert place.image() is not None
    assert caplog.messages == []


def test_files_come_change_and_go_between_requests(place: Place) -> None:
    found = [place.image()]
    place.put("t", A)
    found.append(place.image())
    place.put("t", B, OLD + 1)
    found.append(place.image())
    (place.path / "t").unlink()
    found.append(place.image())

    assert (found, place.reports()) == ([None, "/images/a", "/images/b", None], [])


@pytest.mark.parametrize("name", ["", ".", "..", "*", "../t", "a/b", "a\\b", "a\0", "x" * 256])
def test_what_cannot_be_an_id_is_not_looked_for(place: Place, name: str) -> None:
    (place.path / "..").joinpath("t").touch()

    assert (place.image(name), place.reports()) == (None, [])


def test_a_missing_directory_knows_no_transfer_and_is_no_news(place: Place) -> None:
    place.path.rmdir()

    assert (place.image(), place.reports()) == (None, [])


# The cache


@pytest.mark.parametrize(
    ("age_ns", "times"),
    [
        pytest.param(-SECOND, 2, id="from-the-future"),
        pytest.param(0, 2, id="just-written"),
        pytest.param(2 * SECOND, 2, id="two-seconds-old"),
        pytest.param(2 * SECOND + 1, 1, id="older-than-two-seconds"),
    ],
)
def test_only_a_file_that_has_settled_is_remembered(
    place: Place, parsed: list[str], age_ns: int, times: int
) -> None:
    place.put("t", A, NOW - age_ns)

    assert [place.image(), place.image()] == ["/images/a"] * 2
    assert parsed == ["t"] * times


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda p: p.put("t", B, OLD + 1), id="mtime"),
        pytest.param(lambda p: p.put("t", B + " ", OLD), id="size"),
        pytest.param(lambda p: p.put("new", B, OLD).rename(p.path / "t"), id="inode"),
    ],
)
def test_a_changed_file_counts_at_once(place: Place, change: object) -> None:
    place.put("t", A)
    before = place.image()

    change(place)  # type: ignore[operator]

    assert [before, place.image()] == ["/images/a", "/images/b"]


def test_a_remembered_file_that_loses_trust_is_unknown(place: Place) -> None:
    file = place.put("t", A)
    before = place.image()
    file.chmod(0o666)

    assert [before, place.image()] == ["/images/a", None]


def test_a_remembered_file_in_a_directory_that_loses_trust_is_unknown(place: Place) -> None:
    place.put("t", A)
    before = place.image()
    place.path.chmod(0o777)

    assert [before, place.image()] == ["/images/a", None]


def test_a_remembered_file_replaced_by_a_link_to_its_like_is_unknown(place: Place) -> None:
    file = place.put("t", A)
    before = place.image()
    file.rename(place.path / "aside")
    file.symlink_to("aside")

    assert [before, place.image()] == ["/images/a", None]


def test_only_so_many_files_are_remembered(
    place: Place, parsed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_CACHE_SIZE", 2)
    for name in ("a", "b", "a", "c", "a", "b"):
        place.put(name, A) if name not in parsed else None
        place.image(name)

    # "a" was used after "b" and outlives it.
    assert parsed == ["a", "b", "c", "b"]


# Reports


def test_a_file_that_does_not_count_is_reported_with_its_path_and_field(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    place.put("t", '{"backend":"file"}')

    assert place.image() is None
    line = logs.formatter("text").format(caplog.records[0])
    assert line.endswith(rf' transfer file ignored path={place.path}/t problem="missing \"file\""')
    fields = {"path": f"{place.path}/t", "problem": 'missing "file"'}
    assert [told(record) for record in caplog.records] == [("transfer file ignored", fields)]


def test_ignored_fields_are_reported_once_per_change_by_one_worker(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    for number in (0, 1):
        place.now = OLD + number  # young, so that it is read each time
        place.put("t", A[:-1] + ',"readonly":true}', OLD + number)
        for each in (place.registry, place.registry, place.another()):
            assert each.get("t").read_only is False

    problem = 'unknown field "readonly"; did you mean "read_only"?'
    warning = (
        "transfer file has ignored fields",
        {"path": f"{place.path}/t", "problem": problem},
    )
    assert [told(record) for record in caplog.records] == [warning] * 2


def test_each_change_is_reported_once(place: Place) -> None:
    for number, text in enumerate(["{", "[]", "[]"]):
        place.put("t", text, OLD + number)
        place.image()
        place.image()

    assert [report.partition(":")[0] for report in place.reports()] == [
        "not valid JSON",
        "not a JSON object",
        "not a JSON object",
    ]


def test_a_file_that_was_right_in_between_is_reported_again(place: Place) -> None:
    for number, text in enumerate(["[]", A, "[]"]):
        place.put("t", text, OLD + number)
        place.image()

    assert place.reports() == ["not a JSON object"] * 2


def test_each_change_of_what_cannot_be_opened_is_reported_once(place: Place) -> None:
    for target in ("here", "there"):
        (place.path / "t").symlink_to(target)
        place.image()
        place.image()
        (place.path / "t").unlink()

    assert len(place.reports()) == 2


def test_a_directory_that_was_right_in_between_is_reported_again(place: Place) -> None:
    for mode in (0o777, 0o755, 0o777):
        place.path.chmod(mode)
        place.image()

    assert len(place.reports()) == 2


def test_what_another_worker_has_reported_is_not_reported_again(place: Place) -> None:
    place.put("t", "[]")
    place.image()
    place.registry = place.another()

    assert (place.image(), place.reports()) == (None, ["not a JSON object"])


def test_a_bad_directory_is_reported_once_whatever_is_asked_for(place: Place) -> None:
    place.path.chmod(0o777)

    assert [place.image("a"), place.image("b")] == [None, None]
    assert len(place.reports()) == 1


def test_only_so_many_reports_are_remembered(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_CACHE_SIZE", 2)
    for name in "abc":
        place.put(name, "[]")
        place.image(name)

    assert list(place.registry._reported) == ["b", "c"]


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EIO])
@pytest.mark.parametrize("at", [0, 1], ids=["directory", "file"])
def test_an_id_that_cannot_be_looked_up_is_not_called_unknown(
    place: Place, monkeypatch: pytest.MonkeyPatch, number: int, at: int
) -> None:
    real, opened = os.open, []

    def fails(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        opened.append(path)
        if len(opened) > at:
            raise OSError(number, os.strerror(number))
        return real(path, flags, mode, dir_fd=dir_fd)

    place.put("t", A)
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fails)
        with pytest.raises(StateUnavailable, match=os.strerror(number)):
            place.registry.get("t")

    assert (place.image(), place.reports()) == ("/images/a", [])


def test_a_file_of_a_time_to_come_is_young(place: Place, parsed: list[str]) -> None:
    """The system's clock may have been set back since; it will be read each time until then."""
    place.put("t", A, NOW + 3600 * SECOND)
    for _ in range(2):
        assert place.image() == "/images/a"
    place.now = NOW + 3603 * SECOND
    for _ in range(2):
        assert place.image() == "/images/a"

    assert parsed == ["t"] * 3
