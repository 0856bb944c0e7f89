# SPDX-License-Identifier: Apache-2.0
"""Tokens: what a client must show beside the id, of a transfer that has one (RFC 6750).

A token is a secret: neither ``str()`` nor ``repr()`` tell it, and it is compared in constant time.
"""

import hmac
import re
from dataclasses import dataclass, field

#: A header field has room for it: without blanks, and half as long as the longest that is taken.
_SECRET = re.compile(r"[!-~]{1,4096}")
#: What ``_SECRET`` says, for messages.
VALID = "1 to 4096 visible ASCII characters, without blanks"


@dataclass(frozen=True, slots=True)
class Token:
    """The token of a transfer."""

    secret: str = field(repr=False)

    def __str__(self) -> str:
        return "a token"

    def is_shown(self, authorization: str | None) -> bool:
        """Tell whether an ``Authorization`` field has this token, after the scheme ``Bearer``.

        How long the comparison takes depends on the field, and on the token's length.
        """
        scheme, _, value = (authorization or "").partition(" ")
        value = value.strip(" ")
        # The scheme is no secret.
        if scheme.lower() != "bearer" or not value:
            return False
        shown = value.encode("utf-8", "surrogatepass")
        return hmac.compare_digest(shown, self.secret.encode())


#: Stands for a token that is not told; no request has it, and no server takes it.
UNTOLD = Token("")


def is_token(text: str) -> bool:
    """Tell whether a text can be a token."""
    return _SECRET.fullmatch(text) is not None
