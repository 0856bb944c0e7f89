# SPDX-License-Identifier: Apache-2.0
"""What is left of an answer that began before the bytes that were wanted."""

import pytest

from imageserver.core.extents import Reply


@pytest.mark.parametrize(
    ("skipped", "rest"),
    [
        pytest.param(0, Reply([4, 6, 2], [0, 1, 2]), id="nothing"),
        pytest.param(3, Reply([1, 6, 2], [0, 1, 2]), id="part-of-an-extent"),
        pytest.param(4, Reply([6, 2], [1, 2]), id="an-extent"),
        pytest.param(11, Reply([1], [2]), id="all-but-a-byte"),
        pytest.param(12, Reply((), ()), id="all"),
        pytest.param(99, Reply((), ()), id="more"),
    ],
)
def test_an_answer_begins_where_it_is_wanted(skipped: int, rest: Reply) -> None:
    assert Reply([4, 6, 2], [0, 1, 2]).after(skipped) == rest
