# SPDX-License-Identifier: Apache-2.0
"""JSON as RFC 8259 has it: UTF-8, no NaN, and integers of any length in bounded time.

``json.loads`` takes more than that (UTF-16, ``NaN``), and its errors, and the interpreter's, are
not written for clients.
"""

import json
import re

from imageserver.core.bounds import cut_short

#: Nesting of lists and objects: more than any client needs. The interpreter's own limit differs
#: between versions, from 1,000 to 100,000.
MAX_DEPTH = 100
_BRACKET_OR_STRING = re.compile(r'[\[{]|[\]}]|"(?:[^"\\]|\\.)*+"?', re.DOTALL)


class InvalidJson(Exception):
    """The text is no JSON; ``str()`` says where, in a client's terms."""


def parse_json(text: bytes) -> object:
    """Parse a JSON text.

    Raises:
        InvalidJson: it is none.
    """
    try:
        decoded = text.decode("utf-8")
        _refuse_depth(decoded)
        if decoded.startswith("\ufeff"):
            return json.loads(decoded)  # which refuses it (RFC 8259 section 8.1)
        return _DECODER.decode(decoded)
    except UnicodeDecodeError as exc:
        raise InvalidJson(f"not UTF-8 at byte {exc.start}") from exc
    except json.JSONDecodeError as exc:
        raise InvalidJson(f"{exc.msg} at character {exc.pos}") from exc


def _refuse_depth(text: str) -> None:
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return  # as in almost every text
    depth = 0
    for found in _BRACKET_OR_STRING.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)
        if depth > MAX_DEPTH:
            raise InvalidJson("nested too deeply")


def _integer(digits: str) -> int:
    return -cut_short(digits[1:]) if digits.startswith("-") else cut_short(digits)


def _refuse_constant(name: str) -> object:
    raise InvalidJson(f"{name} is not a JSON value")


_DECODER = json.JSONDecoder(parse_int=_integer, parse_constant=_refuse_constant)
