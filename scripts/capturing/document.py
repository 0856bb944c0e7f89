# SPDX-License-Identifier: Apache-2.0
"""Blocks of a Markdown file that a program writes; all else is left as it is.

<!-- capture NAME -->
anything: replaced
<!-- end -->
"""

import re
from collections.abc import Mapping

_BLOCK = re.compile(r"(<!-- capture ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


class UnknownBlock(Exception):
    """Markers and captures do not match; ``str()`` names those that are alone."""


def blocks(text: str) -> dict[str, str]:
    """Return what each block holds."""
    return {
        match[2]: match[0].removeprefix(match[1]).removesuffix(match[3])
        for match in _BLOCK.finditer(text)
    }


def filled(text: str, captures: Mapping[str, str]) -> str:
    """Replace each block; there must be one for each capture, and the other way round."""
    alone = set(blocks(text)) ^ set(captures)
    if alone:
        raise UnknownBlock(f"in the document or among the captures only: {sorted(alone)}")
    return _BLOCK.sub(lambda match: match[1] + captures[match[2]] + match[3], text)
