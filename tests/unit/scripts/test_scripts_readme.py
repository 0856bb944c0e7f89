# SPDX-License-Identifier: Apache-2.0
"""The README repeats two things that are declared elsewhere: settings and the tour.

When one of these tests fails, copy what it expected into the README.
"""

import re
from dataclasses import MISSING, fields
from pathlib import Path

from imageserver.settings import Settings, as_text, variable_of

ROOT = Path(__file__).parents[3]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def settings_table() -> str:
    rows = ["| variable | default | meaning |", "| --- | --- | --- |"]
    for field in fields(Settings):
        default = field.metadata["shown"]
        if not default:
            assert field.default is not MISSING, f"{field.name} shows no default"
            default = f"`{as_text(field.default)}`"
        rows.append(f"| `{variable_of(field.name)}` | {default} | {field.metadata['help']} |")
    return "\n".join(rows) + "\n"


def tour() -> str:
    script = (ROOT / "scripts" / "run").read_text(encoding="utf-8")
    found = re.search(r"<<TOUR\n(.*?)^TOUR$", script, re.DOTALL | re.MULTILINE)
    assert found is not None
    text = found[1].replace("$url", "http://127.0.0.1:54323")
    return text.replace("$admin", "http://127.0.0.1:54324")


def test_the_settings_table_is_what_the_settings_declare() -> None:
    assert settings_table() in README


def test_the_tour_is_what_scripts_run_prints() -> None:
    place = "out=$(mktemp -d)    # for the files that these lines write\n"
    assert f"```sh\n{place}{tour()}```\n" in README
