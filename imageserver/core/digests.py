# SPDX-License-Identifier: Apache-2.0
"""Digests that a client announces of its body (RFC 9530), in a dictionary of RFC 8941.

    Content-Digest: sha-256=:BASE64:, sha-512=:BASE64:

Members of other algorithms are allowed, and count for nothing.
"""

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass

from imageserver.core.errors import BadRequest

#: The algorithms that count, the strongest first; ``hashlib`` has them without the hyphen.
ALGORITHMS = ("sha-512", "sha-256")

_KEY = r"[a-z*][a-z0-9_\-.*]*"
_BARE_ITEM = (
    r"-?[0-9]{1,12}\.[0-9]{1,3}|-?[0-9]{1,15}"
    r'|"(?:[ !#-\[\]-~]|\\["\\])*"'
    r"|[A-Za-z*][!#$%&'*+\-.^_`|~0-9A-Za-z:/]*"
    r"|:[A-Za-z0-9+/=]*:"
    r"|\?[01]"
)
#: A member whose value is a byte sequence; parameters are allowed, and mean nothing.
_MEMBER = re.compile(rf"({_KEY})=:([A-Za-z0-9+/=]*):(?:; *{_KEY}(?:=(?:{_BARE_ITEM}))?)*")
_COMMA = re.compile(r"[ \t]*,[ \t]*")


@dataclass(frozen=True, slots=True)
class Expected:
    """What a body's bytes must hash to, as ``header`` says."""

    header: str
    algorithm: str
    digest: bytes


def parse_digest(header: str, value: str) -> Expected | None:
    """Return what a digest field of this name asks for; None where it names no known algorithm.

    Raises:
        BadRequest: it is no dictionary of byte sequences, or one has not its algorithm's length.
    """
    members = _members(header, value)
    digests = {name: _decoded(header, members[name]) for name in ALGORITHMS if name in members}
    for name, digest in digests.items():
        if len(digest) != hashlib.new(name.replace("-", "")).digest_size:
            raise _invalid(header)
    return next((Expected(header, *found) for found in digests.items()), None)


def _members(header: str, value: str) -> dict[str, str]:
    """Return the last value of each key, which is the one that counts, in base64."""
    text = value.strip(" ")
    members: dict[str, str] = {}
    at = 0
    while at < len(text) or members:
        member = _MEMBER.match(text, at)
        if member is None:
            raise _invalid(header)
        members[member[1]] = member[2]
        if member.end() == len(text):
            break
        comma = _COMMA.match(text, member.end())
        if comma is None:
            raise _invalid(header)
        at = comma.end()
    for encoded in members.values():
        _decoded(header, encoded)
    return members


def _decoded(header: str, encoded: str) -> bytes:
    """Decode base64, whose padding may be missing (RFC 8941 section 4.2.7)."""
    try:
        return base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except binascii.Error as exc:
        raise _invalid(header) from exc


def _invalid(header: str) -> BadRequest:
    return BadRequest("invalid " + header)
