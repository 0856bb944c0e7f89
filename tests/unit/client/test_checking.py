# SPDX-License-Identifier: Apache-2.0
"""Every check notices the lie that it is for, and finds nothing in an honest server."""

import pytest

from imageserver.client.checking.findings import Finding, Subject, Verdict, findings
from imageserver.client.checking.read_checks import CHECKS
from imageserver.client.checking.write_checks import WRITE_CHECKS
from imageserver.client.http.access import Access
from tests.unit.liars import liar


def found(lie: str, seconds: float = 0) -> list[Finding]:
    with liar(lie) as url:
        subject = Subject(Access(url, timeout_seconds=10), seconds)
        return list(findings(subject, CHECKS + WRITE_CHECKS))


def failed(lie: str) -> set[str]:
    return {one.check for one in found(lie) if one.verdict is Verdict.FAILED}


#: Lie -> the checks that must notice; others may.
LIES: dict[str, set[str]] = {
    "single bytes are wrong": {"first and last bytes"},
    "the size in Content-Range is wrong": {"first and last bytes"},
    "open ends are wrong": {"range without an end"},
    "suffixes are wrong": {"range of the last bytes"},
    "clipping is wrong": {"range across the end"},
    "beyond is 500": {"range beyond the end"},
    "malformed ranges fail": {"malformed ranges"},
    "conditions count": {"conditions"},
    "many readers fail": {"several connections"},
    "zero extents are data": {"extents", "zero what is zero"},
    "extents have a gap": {"extents"},
    "extents end early": {"extents"},
    "dirty extents have a gap": {"dirty extents"},
    "spans are too long": {"extents of a span"},
    "contexts fail": {"extents' context"},
    "checksums are wrong": {"checksum"},
    "every id is known": {"unknown id", "Expect, refused"},
    "every method is known": {"unknown method"},
    "flush fails": {"flush"},
    "writes go elsewhere": {"write at the end", "write inside", "write with PATCH"}
    | {"write and flush", "write with a digest", "Expect: 100-continue"},
    "PATCH does nothing right": {"write with PATCH"},
    "nothing is flushed": {"write and flush"},
    "digests mean nothing": {"write with a digest"},
    "too much is zeroed": {"zero what is zero"},
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_noticed(lie: str) -> None:
    assert LIES[lie] <= failed(lie)


@pytest.mark.parametrize(
    ("manner", "check"),
    [
        ("If-Range matches", "If-Range"),
        ("connections are closed", "keep-alive"),
        ("checksums of whole images", "checksum"),
    ],
)
def test_other_manners_are_no_failure(manner: str, check: str) -> None:
    verdicts = {one.check: one.verdict for one in found(manner)}
    assert verdicts[check] is Verdict.DIFFERS
    assert Verdict.FAILED not in verdicts.values()


def test_an_honest_server_is_believed() -> None:
    others = [one for one in found("checksums") if one.verdict is not Verdict.OK]
    # http.server asks for every body that it is offered.
    assert [(one.check, one.verdict) for one in others] == [("Expect, refused", Verdict.DIFFERS)]


def test_a_server_that_is_busy_for_a_moment_is_asked_again() -> None:
    verdicts = {one.check: one.verdict for one in found("busy for a moment", 10)}
    assert Verdict.FAILED not in verdicts.values()
    assert verdicts["Expect: 100-continue"] is Verdict.OK


def test_every_check_has_a_lie_or_a_manner() -> None:
    without = {"OPTIONS", "HEAD", "If-Range", "keep-alive"}
    assert {check.name for check in CHECKS + WRITE_CHECKS} == set().union(*LIES.values()) | without
