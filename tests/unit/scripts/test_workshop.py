# SPDX-License-Identifier: Apache-2.0
"""CI and pre-commit run what scripts/test runs, where README says that it runs."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[3]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_ci_has_each_distribution_that_readme_names():
    sentence = re.search(r"^On (Debian .*):$", text("README.md"), re.MULTILINE)
    jobs = yaml.safe_load(text(".github/workflows/ci.yml"))["jobs"]

    assert sentence
    assert sentence[1] == "Debian 12 or 13, Ubuntu 24.04 or a current Fedora"
    assert jobs["test"]["strategy"]["matrix"]["image"] == [
        *("debian:12", "debian:13", "ubuntu:24.04", "fedora:latest")
    ]
    assert jobs["test"]["steps"][-1]["run"] == "scripts/test"


def test_a_commit_is_checked_by_the_commands_of_scripts_test():
    script = text("scripts/test").replace('"$python"', ".venv/bin/python")
    hooks = yaml.safe_load(text(".pre-commit-config.yaml"))["repos"][0]["hooks"]
    command = r"^(\.venv/bin/(?:python -m (?:ruff|mypy)|lint-imports).*)$"
    checks = re.findall(command, script, re.MULTILINE)

    assert [hook["entry"] for hook in hooks] == checks
    assert len(checks) == 4
