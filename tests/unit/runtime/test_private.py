# SPDX-License-Identifier: Apache-2.0
"""What the system says of the server's own files, in our words."""

import errno
import os

import pytest

from imageserver.core.errors import Exhausted, StateFull, StateUnavailable
from imageserver.runtime.private import own_files

KINDS = {
    errno.ENOSPC: StateFull,
    errno.EDQUOT: StateFull,
    errno.EMFILE: Exhausted,
    errno.ENFILE: Exhausted,
}


@pytest.mark.parametrize(
    "number",
    ["ENOSPC", "EDQUOT", "EMFILE", "ENFILE", "EIO", "EROFS", "ENOLCK", "ENOENT", "ESTALE"],
)
def test_an_error_of_the_systems_becomes_a_sentence_with_its_cause(number: str) -> None:
    code = getattr(errno, number)

    with pytest.raises(StateUnavailable) as raised, own_files("registrations"):
        raise OSError(code, os.strerror(code), "/run/secret")

    assert type(raised.value) is KINDS.get(code, StateUnavailable)
    assert str(raised.value) == f"registrations cannot be used now: {os.strerror(code)}"
    assert isinstance(raised.value.__cause__, OSError)


def test_what_is_no_error_of_the_systems_passes() -> None:
    with pytest.raises(ZeroDivisionError), own_files("registrations"):
        raise ZeroDivisionError
