# SPDX-License-Identifier: Apache-2.0
"""Validators of an image, and conditions on them (RFC 9110 sections 8.8 and 13).

    file changed        2 s later
    ----|------------------|------------------------------->
        no validators      ETag, Last-Modified

An ``ETag`` here is strong: two answers that have the same one have the same bytes. It is a hash of
what changes with a file: device, inode, size, times of the last change. But a file system's clock
has ticks (4 ms on most machines, 2 s on FAT), and a file that is changed twice within one looks
the same after both. So a file that was changed less than ``SETTLED_NS`` ago has no validators:
whatever changes it after it was given one is in a later tick, and gives it another.

Times that a client sends count only where they equal ``Last-Modified``. They never make parts of
two answers one (``If-Range``), and a later time says nothing: a path, or a transfer, may lead to
another and older file than it did.

What no validator tells: a program that changes a file through a mapping (mmap(2)) may do so for a
while before the file's times change; and what lies behind a block device, whose times are those
of its name in /dev. That has none.
"""

import calendar
import email.utils
import hashlib
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from imageserver.core.errors import BadRequest, PreconditionFailed

#: How long a file must not have been changed to have validators. The longest tick of a file system
#: (FAT's), and more than the clocks of this host and of one that serves files should differ by.
SETTLED_NS = 2_000_000_000
_SECOND_NS = 1_000_000_000

#: RFC 9110 section 8.8.3. Bytes over 127 are obs-text, which WSGI gives as Latin-1.
_TAG = r'(?:W/)?"[\x21\x23-\x7e\x80-\xff]*"'
#: RFC 9110 section 5.6.1: empty elements count for nothing.
_TAGS = re.compile(rf"[ \t]*(?:,[ \t]*)*{_TAG}[ \t]*(?:,[ \t]*(?:{_TAG}[ \t]*)?)*")
_EACH_TAG = re.compile(_TAG)
#: RFC 9110 section 5.6.7: IMF-fixdate, and the two obsolete forms.
_DATE = re.compile(
    r"[A-Z][a-z]{2}, [0-9]{2} [A-Z][a-z]{2} [0-9]{4} [0-9]{2}:[0-9]{2}:[0-9]{2} GMT"
    r"|[A-Z][a-z]{5,8}, [0-9]{2}-[A-Z][a-z]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2} GMT"
    r"|[A-Z][a-z]{2} [A-Z][a-z]{2} [ 0-9][0-9] [0-9]{2}:[0-9]{2}:[0-9]{2} [0-9]{4}"
)


@dataclass(frozen=True, slots=True)
class Validators:
    """What the state of an image can be known by again."""

    etag: str | None = None
    """The strong entity-tag, in quotes; None: none now, so that no condition on it is met."""
    modified: int | None = None
    """When the image was changed last, in seconds (Unix epoch); None: there is no such time.

    Told, and compared, only beside an ``etag``.
    """

    @property
    def last_modified(self) -> str | None:
        """The value of ``Last-Modified``; None: none."""
        if self.etag is None or self.modified is None:
            return None
        return _date(self.modified)

    def is_dated(self, seconds: int) -> bool:
        """Tell whether the image is as when it had this ``Last-Modified``, as far as that tells."""
        return self.etag is not None and self.modified == seconds


#: Of an image that exists, and of which no more is known.
UNKNOWN_STATE = Validators()


class Attributes(Protocol):
    """What is looked at of a file: ``os.stat_result`` has it."""

    @property
    def st_dev(self) -> int:
        """The device that holds the file."""
        ...

    @property
    def st_ino(self) -> int:
        """The file's number there."""
        ...

    @property
    def st_size(self) -> int:
        """Its size in bytes."""
        ...

    @property
    def st_mtime_ns(self) -> int:
        """When its content was changed last, or is said to have been."""
        ...

    @property
    def st_ctime_ns(self) -> int:
        """When anything of it was changed last."""
        ...


def validators_of(found: Attributes, now_ns: int) -> Validators:
    """Return the validators of a regular file that has these attributes at this time."""
    modified = found.st_mtime_ns // _SECOND_NS
    # RFC 9110 section 8.8.2.1: no time in the future.
    told = modified if found.st_mtime_ns <= now_ns else None
    if now_ns - found.st_ctime_ns < SETTLED_NS:
        return Validators(None, told)
    times = found.st_mtime_ns, found.st_ctime_ns
    return Validators(_tag(found.st_dev, found.st_ino, found.st_size, *times), told)


@lru_cache(maxsize=256)  # clients ask for one range of a file after the other
def _tag(*facts: int) -> str:
    return f'"{hashlib.blake2b(repr(facts).encode(), digest_size=16).hexdigest()}"'


@lru_cache(maxsize=256)
def _date(seconds: int) -> str:
    return email.utils.formatdate(seconds, usegmt=True)


@dataclass(frozen=True, slots=True)
class Tags:
    """The value of ``If-Match`` or ``If-None-Match``; no tags: ``*``, any state."""

    tags: frozenset[str]

    def match(self, state: Validators | None) -> bool:
        """Tell whether the state is one of these, compared strongly."""
        if state is None or not self.tags:
            return state is not None
        return state.etag in self.tags

    def match_weakly(self, state: Validators | None) -> bool:
        """Tell whether the state is one of these, weak tags included."""
        if self.match(state) or state is None or state.etag is None:
            return self.match(state)
        return f"W/{state.etag}" in self.tags


@dataclass(frozen=True, slots=True)
class Conditions:
    """What a request depends on: the fields of RFC 9110 section 13.1; None: absent."""

    match: Tags | None = None
    none_match: Tags | None = None
    modified_since: int | None = None
    unmodified_since: int | None = None
    if_range: str | None = None

    @property
    def names_state(self) -> bool:
        """The request is about one state of the image, and no other."""
        return bool(self.if_range or self.unmodified_since is not None) or bool(
            self.match and self.match.tags
        )

    def allow(self, state: Validators | None) -> bool:
        """Tell whether a read goes on, in the order of section 13.2.2; False: 304.

        ``state`` is None where there is no image yet.

        Raises:
            PreconditionFailed: the image is in a state that the request excludes.
        """
        self._check_wanted(state)
        if self.none_match:
            return not self.none_match.match_weakly(state)
        since = self.modified_since
        return since is None or state is None or not state.is_dated(since)

    def check(self, state: Validators | None) -> None:
        """As ``allow``, of a request that changes the image.

        Raises:
            PreconditionFailed: it must not be changed.
        """
        self._check_wanted(state)
        if self.none_match and self.none_match.match_weakly(state):
            raise PreconditionFailed

    def _check_wanted(self, state: Validators | None) -> None:
        if self.match:
            if not self.match.match(state):
                raise PreconditionFailed
            return
        since = self.unmodified_since
        if since is None or state is None or state.modified is None:
            return  # section 13.1.4: without a time to compare, the field is ignored
        if not state.is_dated(since):
            raise PreconditionFailed

    def allow_range(self, state: Validators | None) -> bool:
        """Tell whether ``If-Range`` is there and names this very state (section 13.1.5)."""
        return bool(self.if_range and state and self.if_range == state.etag)


#: Of most requests.
UNCONDITIONAL = Conditions()


def parse_tags(name: str, value: str) -> Tags:
    """Parse ``If-Match`` or ``If-None-Match``, the header ``name``.

    Raises:
        BadRequest: it is neither ``*`` nor a list of entity-tags. Ignoring it could let a request
            overwrite what its client did not mean to.
    """
    if value.strip(" \t") == "*":
        return Tags(frozenset())
    if not _TAGS.fullmatch(value):
        raise BadRequest(f"invalid {name} header")
    return Tags(frozenset(_EACH_TAG.findall(value)))


def parse_date(value: str) -> int | None:
    """Parse an HTTP-date into seconds (Unix epoch); None: it is none, and the field is ignored."""
    if not _DATE.fullmatch(value.strip(" \t")):
        return None
    parsed = email.utils.parsedate(value)
    try:
        return calendar.timegm(parsed) if parsed else None
    except (ValueError, OverflowError):  # the 31st of February
        return None
