# SPDX-License-Identifier: Apache-2.0
"""Validators: which state has them, and what every condition says of every state."""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from imageserver.core.errors import BadRequest, PreconditionFailed
from imageserver.core.validators import (
    SETTLED_NS,
    UNKNOWN_STATE,
    Conditions,
    Tags,
    Validators,
    parse_date,
    parse_tags,
    validators_of,
)

DATED = 784111777
DATE = "Sun, 06 Nov 1994 08:49:37 GMT"
SETTLED = Validators('"a"', DATED)
YOUNG = Validators(None, DATED)
ANY = Tags(frozenset())
A, WEAK_A, B = (Tags(frozenset([tag])) for tag in ('"a"', 'W/"a"', '"b"'))
#: Every kind of state: a file, one that has just changed, an export, and none yet.
STATES = (SETTLED, YOUNG, UNKNOWN_STATE, None)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(b"bytes")
    return path


def later(found: os.stat_result, after_ns: int = SETTLED_NS) -> Validators:
    return validators_of(found, found.st_ctime_ns + after_ns)


def test_a_file_has_validators_once_no_change_can_look_the_same(file: Path) -> None:
    found = file.stat()
    modified = found.st_mtime_ns // 10**9

    assert later(found, SETTLED_NS - 1) == Validators(None, modified)
    assert later(found).modified == modified
    assert (later(found).etag or "")[::33] == '""'
    assert later(found).last_modified == time.strftime(
        "%a, %d %b %Y %H:%M:%S GMT", time.gmtime(modified)
    )
    assert later(found, SETTLED_NS - 1).last_modified is None


def test_whatever_changes_a_file_changes_its_tag(file: Path) -> None:
    tags = [later(file.stat()).etag]
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    time.sleep(0.02)  # a tick of the file system's clock
    file.write_bytes(b"other")  # in place, of the same length
    os.utime(file, ns=times)  # ... and with the same time
    tags.append(later(file.stat()).etag)
    copy = file.with_name("copy")
    copy.write_bytes(b"bytes")
    os.utime(copy, ns=times)
    copy.rename(file)
    tags.append(later(file.stat()).etag)

    assert len({*tags}) == len(tags)


def test_a_time_in_the_future_is_not_told(file: Path) -> None:
    os.utime(file, ns=(0, 1 << 62))

    state = later(file.stat())
    assert (state.modified, state.last_modified) == (None, None)
    assert state.etag


@pytest.mark.parametrize(
    ("conditions", "allowed"),
    [
        pytest.param(Conditions(), (True, True, True, True), id="none"),
        pytest.param(Conditions(match=ANY), (True, True, True, None), id="If-Match: *"),
        pytest.param(Conditions(match=A), (True, None, None, None), id="If-Match"),
        pytest.param(Conditions(match=WEAK_A), (None,) * 4, id="If-Match: weak"),
        pytest.param(Conditions(match=B), (None,) * 4, id="If-Match: another"),
        pytest.param(Conditions(none_match=ANY), (False, False, False, True), id="If-None-Match"),
        pytest.param(Conditions(none_match=A), (False, True, True, True), id="If-None-Match: tag"),
        pytest.param(
            Conditions(none_match=WEAK_A), (False, True, True, True), id="If-None-Match: weak"
        ),
        pytest.param(Conditions(none_match=B), (True,) * 4, id="If-None-Match: another"),
        pytest.param(
            Conditions(modified_since=DATED), (False, True, True, True), id="If-Modified-Since"
        ),
        pytest.param(Conditions(modified_since=DATED + 1), (True,) * 4, id="since a later time"),
        pytest.param(Conditions(modified_since=DATED - 1), (True,) * 4, id="since an earlier time"),
        pytest.param(
            Conditions(unmodified_since=DATED), (True, None, True, True), id="If-Unmodified-Since"
        ),
        pytest.param(
            Conditions(unmodified_since=DATED + 1),
            (None, None, True, True),
            id="unmodified since a later time",
        ),
        pytest.param(
            Conditions(match=A, unmodified_since=0),
            (True, None, None, None),
            id="If-Match before If-Unmodified-Since",
        ),
        pytest.param(
            Conditions(none_match=B, modified_since=DATED),
            (True,) * 4,
            id="If-None-Match before If-Modified-Since",
        ),
        pytest.param(
            Conditions(match=A, none_match=A), (False, None, None, None), id="both, in their order"
        ),
    ],
)
def test_a_condition_says_of_every_state_whether_a_read_goes_on(
    conditions: Conditions, allowed: tuple[bool | None, ...]
) -> None:
    assert tuple(outcome(conditions.allow, state) for state in STATES) == allowed
    # A change is refused where a read is, or has nothing new to say (section 13.1.2); only reads
    # look at If-Modified-Since.
    changing = replace(conditions, modified_since=None)
    assert [outcome(changing.check, state) is not REFUSED for state in STATES] == [
        bool(outcome(changing.allow, state)) for state in STATES
    ]


REFUSED = None


def outcome(
    condition: Callable[[Validators | None], bool | None], state: Validators | None
) -> bool | None:
    try:
        return condition(state) is not False
    except PreconditionFailed:
        return REFUSED


@pytest.mark.parametrize(
    ("text", "allowed"),
    [('"a"', True), ('W/"a"', False), ('"b"', False), (DATE, False), ("", False)],
)
def test_if_range_is_met_by_the_very_tag_only(text: str, allowed: bool) -> None:
    conditions = Conditions(if_range=text)

    assert [conditions.allow_range(state) for state in STATES] == [allowed, False, False, False]


@pytest.mark.parametrize(
    ("value", "tags"),
    [
        ("*", []),
        (' "a"\t', ['"a"']),
        ('"a",W/"b" , "" ,, "\xe9,"', ['"a"', 'W/"b"', '""', '"\xe9,"']),
        (', "a",', ['"a"']),
    ],
)
def test_a_list_of_tags_is_parsed(value: str, tags: list[str]) -> None:
    assert parse_tags("If-Match", value) == Tags(frozenset(tags))


@pytest.mark.parametrize(
    "value",
    ["", " ", ",", "a", '"a', 'w/"a"', '"a" "b"', '*,"a"', '"a\x7f"', '"a b"', ", " * 4000 + "x"],
    ids=repr,
)
def test_what_is_no_list_of_tags_is_refused(value: str) -> None:
    with pytest.raises(BadRequest, match=r"^invalid If-Match header$"):
        parse_tags("If-Match", value)


@pytest.mark.parametrize(
    "text", [DATE, "Sunday, 06-Nov-94 08:49:37 GMT", "Sun Nov  6 08:49:37 1994"]
)
def test_dates_have_three_forms(text: str) -> None:
    assert parse_date(text) == DATED


@pytest.mark.parametrize(
    "text", ["", "0", "yesterday", "Sun, 06 Nov 1994 08:49:37 +0000", DATE + "x"]
)
def test_what_is_no_date_says_nothing(text: str) -> None:
    assert parse_date(text) is None
