# SPDX-License-Identifier: Apache-2.0
"""The stub of libnbd's module promises what the module has."""

import ast
import inspect
from pathlib import Path

import nbd
import pytest

STUB = Path(__file__).parents[3] / "typings" / "nbd.pyi"
TREE = ast.parse(STUB.read_text(encoding="utf-8"))
CLASSES = {node.name: node for node in TREE.body if isinstance(node, ast.ClassDef)}
METHODS = {
    (name, method.name): [argument.arg for argument in method.args.args]
    for name, node in CLASSES.items()
    for method in node.body
    if isinstance(method, ast.FunctionDef)
}


@pytest.mark.parametrize("place", METHODS, ids=".".join)
def test_a_method_has_the_parameters_that_the_stub_gives_it(place: tuple[str, str]):
    name, method = place
    there = getattr(getattr(nbd, name), method)
    if not isinstance(there, property):
        assert list(inspect.signature(there).parameters) == METHODS[place]


def test_every_constant_is_there_and_a_number():
    names = [
        node.target.id
        for node in TREE.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    ]
    assert names
    assert {type(getattr(nbd, name)) for name in names} == {int}
