# SPDX-License-Identifier: Apache-2.0
"""The tree of failures: as drawn in its docstring, with facts on the leaves and no HTTP in them."""

import re

import pytest

from imageserver.core import errors
from imageserver.core.errors import (
    BadRequest,
    ImageServerError,
    MethodNotAllowed,
    NoImageSlot,
    NoSlot,
    RangeOutsideImage,
    ShortBody,
)
from imageserver.core.slots import Kind


def _drawn() -> set[tuple[str, str]]:
    """Read (class, parent) pairs off the docstring's tree: four columns a level."""
    path: list[str] = []
    pairs = set()
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"    ([│├└─ ]*)([A-Z]\w+)", line)
        if match:
            del path[len(match[1]) // 4 :]
            pairs.add((match[2], path[-1] if path else "Exception"))
            path.append(match[2])
    return pairs


def test_the_tree_in_the_docstring_is_the_tree_of_classes() -> None:
    defined = {
        (name, value.__base__.__name__)
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, Exception)
    }

    assert _drawn() == defined


def test_no_failure_knows_an_http_status() -> None:
    failures = [ImageServerError, *_descendants(ImageServerError)]

    assert [f.__name__ for f in failures if hasattr(f, "status") or hasattr(f, "code")] == []


def _descendants(root: type) -> list[type]:
    return [leaf for child in root.__subclasses__() for leaf in (child, *_descendants(child))]


@pytest.mark.parametrize(
    ("error", "fact", "expected", "text"),
    [
        pytest.param(BadRequest("no"), "message", "no", "no", id="bad-request"),
        pytest.param(
            errors.UnsupportedMediaType("no"), "message", "no", "no", id="unsupported-media-type"
        ),
        pytest.param(
            MethodNotAllowed(("GET", "OPTIONS")),
            "allowed",
            ("GET", "OPTIONS"),
            "GET, OPTIONS",
            id="method-not-allowed",
        ),
        pytest.param(
            RangeOutsideImage(7), "size", 7, "range outside an image of 7 bytes", id="range"
        ),
        pytest.param(NoSlot(Kind.READ), "kind", Kind.READ, "no free read slot", id="no-read-slot"),
        pytest.param(
            NoSlot(Kind.WRITE), "kind", Kind.WRITE, "no free write slot", id="no-write-slot"
        ),
        pytest.param(
            NoImageSlot(Kind.READ),
            "kind",
            Kind.READ,
            "no free read slot of this image",
            id="no-read-slot-of-this-image",
        ),
        pytest.param(ShortBody(3), "received", 3, "body ended after 3 bytes", id="short-body"),
    ],
)
def test_a_failure_carries_its_fact(
    error: ImageServerError, fact: str, expected: object, text: str
) -> None:
    assert (getattr(error, fact), str(error)) == (expected, text)
