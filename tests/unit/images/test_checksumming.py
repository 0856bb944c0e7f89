# SPDX-License-Identifier: Apache-2.0
"""A checksum under way: how often it asks whether it is to end."""

from collections.abc import Generator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from imageserver.core.checksums import Recipe
from imageserver.core.errors import ClientGone
from imageserver.core.extents import Extent
from imageserver.core.ranges import Span
from imageserver.images.checksumming import checksum

GIB = 1 << 30


class _Hole(nullcontext[None]):
    """A session of an image that is one hole; its request has been cut."""

    has_extents = True
    info = SimpleNamespace(multi_conn=True)

    def __init__(self) -> None:
        super().__init__()
        self.request = self.backend = self

    def begin(self, _span: Span) -> None:
        """Nothing is counted."""

    def check(self) -> None:
        raise ClientGone

    def stop(self) -> None:
        """Nothing is under way."""

    def extents(self, start: int, stop: int, *, dirty: bool) -> Generator[list[Extent]]:
        assert not dirty
        yield [(start, stop - start, True, False)]


def test_a_whole_checksum_of_a_hole_asks_before_it_has_hashed_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hashed: list[int] = []
    monkeypatch.setattr(Recipe, "add_zeros", lambda _self, length: hashed.append(length))
    session: Any = _Hole()
    with pytest.raises(ClientGone):
        for _ in checksum(session, Span(0, 8 * GIB, 8 * GIB), Recipe("whole-sha512", None)):
            pass
    assert hashed == [64 << 20]
