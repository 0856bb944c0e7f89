# SPDX-License-Identifier: Apache-2.0
"""Tokens from files or the environment: a command line can be read by every user of a machine."""

import os

from imageserver.client.failures import LocalFailure
from imageserver.core.token import VALID, is_token

#: The variable that has a token.
VARIABLE = "IMAGECTL_TOKEN"
#: Longest file that is read, in bytes: a token, and blanks around it.
_MAX_FILE = 64 * 1024


def read_token(path: str) -> str:
    """Return the token in a file, without the blanks and line ends around it.

    Raises:
        LocalFailure: the file cannot be read, or has something else.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(_MAX_FILE)
    except OSError as exc:
        raise LocalFailure(f"cannot read the token in {path}: {exc.strerror}") from exc
    return _checked(text.decode("ascii", "replace"), f"the token in {path}")


def token_of_environment() -> str | None:
    """Return the token of ``IMAGECTL_TOKEN``; None where that is absent or blank.

    Raises:
        LocalFailure: it is no token.
    """
    text = os.environ.get(VARIABLE, "")
    return _checked(text, f"the token in {VARIABLE}") if text.strip() else None


def _checked(text: str, what: str) -> str:
    token = text.strip()
    if not is_token(token):  # nothing of it is shown
        raise LocalFailure(f"{what} cannot be one: it must be {VALID}")
    return token
