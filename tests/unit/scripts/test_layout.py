# SPDX-License-Identifier: Apache-2.0
"""Every picture of the package shows the package, and it keeps its measures.

The layers of the import contract (pyproject.toml) are what all else is compared with.
"""

import ast
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import imageserver

ROOT = Path(__file__).parents[3]
PACKAGE = ROOT / "imageserver"
MODULES = sorted(PACKAGE.rglob("*.py"))

MOST_ENTRIES = 14
MOST_LEVELS = 8
MOST_LINES = 350
MOST_LINES_OF_A_FUNCTION = 50


def contract(container: str) -> list[set[str]]:
    """Return the layers of a package as its contract has them, the topmost first."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        contracts = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    (layers,) = [found["layers"] for found in contracts if found.get("containers") == [container]]
    return [set(re.split(r" [|:] ", layer)) for layer in layers]


LAYERS = contract("imageserver")


def entries(package: Path) -> set[str]:
    """Return the modules and packages in a package."""
    return {
        path.stem if path.is_file() else path.name
        for path in package.iterdir()
        if path.name not in {"__init__.py", "__pycache__", "py.typed"}
    }


def rows(text: str, head: str) -> list[list[str]]:
    """Return the names in the first column of the Markdown table under a head."""
    table = text.partition(f"{head}\n| --- | --- |\n")[2].partition("\n\n")[0]
    return [re.findall(r"`([\w/]+)`", line.split("|")[1]) for line in table.splitlines()]


def layers_of(names: Iterator[str]) -> list[set[str]]:
    """Group names, in their order, into as many for each layer as the contract has."""
    return [{next(names, "") for _ in layer} for layer in LAYERS] + [set(names)]


def test_the_docstring_of_the_package_has_the_layers_of_the_contract():
    assert imageserver.__doc__
    picture = re.findall(r"^    (\w.*?)  +\w", imageserver.__doc__, re.MULTILINE)
    assert [set(line.split(", ")) for line in picture] == LAYERS


@pytest.mark.parametrize("document", ["docs/design.md", "CONTRIBUTING.md"])
def test_the_table_of_entries_has_the_layers_of_the_contract(document: str):
    text = (ROOT / document).read_text(encoding="utf-8")
    table = rows(text, "| entry of `imageserver/` | what lives there |")
    names = (name.rstrip("/") for row in table for name in row)
    assert layers_of(names) == [*LAYERS, set()]


def test_the_table_of_entries_has_a_slash_behind_packages_only():
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    table = rows(text, "| entry of `imageserver/` | what lives there |")
    names = [name for row in table for name in row]
    assert names == [f"{n.rstrip('/')}/" if (PACKAGE / n).is_dir() else n for n in names]


@pytest.mark.parametrize(
    "package", sorted(entries(PACKAGE) - {"client"} - {path.stem for path in PACKAGE.glob("*.py")})
)
def test_each_module_has_a_row_in_the_table_of_its_package(package: str):
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    named = [name for row in rows(text, f"| `{package}/` | |") for name in row]
    modules = (path.relative_to(PACKAGE / package) for path in (PACKAGE / package).rglob("*.py"))
    assert sorted(named) == sorted(
        str(path.with_suffix("")) for path in modules if path.name != "__init__.py"
    )


def test_each_part_of_imagectl_has_a_row():
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    named = {name.rstrip("/") for row in rows(text, "| `client/` | |") for name in row}
    assert named == entries(PACKAGE / "client") - {"__main__"}


def test_the_journey_of_a_request_goes_through_places_that_are_there():
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    section = text.partition("\n## A request's journey\n")[2].partition("\n## ")[0]
    pictures = re.findall(r"^```\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    for picture in pictures:
        places = re.findall(r"(?<![\w/])([a-z]+/[\w/]*)", picture)
        assert [place for place in places if not is_there(place)] == []
        assert {place.partition("/")[0] for place in places} >= {
            *("server", "web", "images", "backends", "runtime", "observability")
        }
    assert len(pictures) == 2


def is_there(place: str) -> bool:
    """Tell whether a place is a module, or with a slash behind it a package."""
    return (
        (PACKAGE / place).is_dir() if place.endswith("/") else (PACKAGE / f"{place}.py").is_file()
    )


def test_the_contract_names_what_is_there():
    assert set.union(*LAYERS) == entries(PACKAGE)
    assert set.union(*contract("imageserver.client")) == entries(PACKAGE / "client")


def test_the_listing_of_the_package_is_short():
    assert len(entries(PACKAGE) | {"__init__"}) <= MOST_ENTRIES


def imported(path: Path) -> Iterator[str]:
    """Yield the entries of the package that a module imports from."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "imageserver":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").removeprefix("imageserver.").partition(".")[0]
        elif isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[2].partition(".")[0] for alias in node.names)


def edges() -> dict[str, set[str]]:
    """Return which entries of the package each of them imports."""
    found: dict[str, set[str]] = {name: set() for name in entries(PACKAGE)}
    for path in MODULES:
        importer = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if importer != "__init__":
            found[importer] |= set(imported(path)) & found.keys() - {importer}
    return found


def test_imports_go_down_without_a_circle_and_not_deep():
    below = edges()

    @cache
    def level(entry: str) -> int:  # of a circle: RecursionError
        return 1 + max(map(level, below[entry]), default=0)

    assert max(map(level, below)) <= MOST_LEVELS
    assert level("core") == 1


def test_no_module_is_long():
    lengths = {
        str(path.relative_to(PACKAGE)): path.read_text(encoding="utf-8").count("\n")
        for path in MODULES
    }
    assert {name for name, lines in lengths.items() if lines > MOST_LINES} == set()


def test_no_module_of_tests_is_long():
    long = {
        path.name
        for path in (ROOT / "tests").rglob("*.py")
        if path.read_text(encoding="utf-8").count("\n") > MOST_LINES
    }
    assert long == set()


def test_no_function_is_long():
    lengths = {
        f"{path.relative_to(PACKAGE)}:{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    long = {name for name, lines in lengths.items() if lines > MOST_LINES_OF_A_FUNCTION}
    assert long == set()
