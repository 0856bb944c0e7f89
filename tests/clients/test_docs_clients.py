# SPDX-License-Identifier: Apache-2.0
"""docs/clients.md is true: each recipe, run in the document's order, prints what it shows."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.harness import ROOT
from tests.system.test_docs_api import FENCE, Demo

DOCUMENT = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
BLOCKS = [(block[1], block[2]) for block in FENCE.finditer(DOCUMENT)]
#: Starts the demo, and goes where the recipes run.
(START, ENTER), REST = BLOCKS[:2], BLOCKS[2:]
RECIPES = list(zip(REST[0::2], REST[1::2], strict=True))


@pytest.fixture(scope="module")
def demo() -> Iterator[Demo]:
    with tempfile.TemporaryDirectory(prefix="is-") as name:
        demo = Demo(Path(name))
        with demo.running(START[1]):
            demo.enter(ENTER[1])
            yield demo


def first_word(recipe: tuple[tuple[str, str], tuple[str, str]]) -> str:
    return recipe[0][1].split()[0]


@pytest.mark.parametrize("recipe", RECIPES, ids=first_word)
def test_a_recipe_prints_what_the_document_shows(demo, recipe):
    (language, code), (kind, shown) = recipe
    assert (language, kind) == ("sh", "text")
    assert demo.run(code).rstrip("\n") == shown.rstrip("\n")


def test_every_client_has_a_recipe() -> None:
    code = "".join(code for _, code in BLOCKS)
    clients = ("client.upload(", "client.download(", "qemu-img convert", "nbdkit", "curl -fsS -T")
    for client in (*clients, "wget -q -c", "requests.put(", "httpx.Client("):
        assert client in code
