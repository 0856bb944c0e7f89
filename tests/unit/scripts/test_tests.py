# SPDX-License-Identifier: Apache-2.0
"""What holds for the tests themselves."""

import ast
from pathlib import Path

import pytest

from tests.system.harness import program
from tests.system.skips import ABILITIES, Ability, _succeeds, needs

TESTS = Path(__file__).parents[2]
SKIPPING = {"skip", "skipif", "importorskip", "SkipTest", "skipUnless", "skipIf"}


def skips(path: Path) -> list[str]:
    """Return the places of a module that name what skips a test."""
    return [
        f"{path.relative_to(TESTS)}:{node.lineno}"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in SKIPPING
    ]


def test_what_may_skip_is_in_one_list() -> None:
    modules = [path for path in TESTS.rglob("*.py") if path.name != "skips.py"]

    assert [place for path in modules for place in skips(path)] == []
    assert skips(TESTS / "system" / "skips.py") != []
    assert len(modules) > 100


def test_each_ability_has_a_name_of_its_own_and_a_reason() -> None:
    assert len({ability.name for ability in ABILITIES}) == len(ABILITIES)
    assert "" not in {text for ability in ABILITIES for text in (ability.name, ability.reason)}


def test_what_is_not_in_the_list_cannot_be_needed() -> None:
    with pytest.raises(StopIteration):
        needs("luck")


def test_a_missing_program_skips_nothing() -> None:
    assert Ability("x", "x", lambda: _succeeds("no-such-program")).is_there()
    assert not _succeeds("false")


def test_a_program_that_users_have_not_in_their_path_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")

    assert program("haproxy").endswith("/sbin/haproxy")
