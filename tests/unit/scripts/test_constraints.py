# SPDX-License-Identifier: Apache-2.0
"""constraints.txt pins one version of each package, which pyproject.toml allows."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[3]


def named() -> list[Requirement]:
    """Return what pyproject.toml asks for, of all kinds."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    found = [Requirement(line) for group in groups for line in group]
    return [requirement for requirement in found if requirement.name != "imageserver"]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = [line.split("==") for line in lines if not line.startswith("#")]
    found = {canonicalize_name(name): version for name, version in pinned}
    assert len(found) == len(pinned)
    return found


def test_each_package_that_is_asked_for_is_pinned_to_a_version_it_may_have():
    pinned = pins()
    wrong = [
        str(requirement)
        for requirement in named()
        if pinned[canonicalize_name(requirement.name)] not in requirement.specifier
    ]
    assert wrong == []


def test_each_package_that_is_asked_for_has_an_upper_bound():
    unbounded = [
        str(requirement)
        for requirement in named()
        if not any(specifier.operator == "<" for specifier in requirement.specifier)
    ]
    assert unbounded == []
