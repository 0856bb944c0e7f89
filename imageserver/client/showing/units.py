# SPDX-License-Identifier: Apache-2.0
"""Text for people: sizes, shares, rates, times; and text of others, made safe for a terminal."""

_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_STEP = 1024
#: Three digits: below each bound, so many decimals.
_DECIMALS = ((10, 2), (100, 1), (_STEP, 0))


def plain_text(text: str) -> str:
    """Return text of others as one line, without control characters."""
    return "".join(c if c.isprintable() else "?" for c in text)


def size_text(size: float) -> str:
    """Return a number of bytes in the unit that fits: ``512 B``, ``1.5 MiB``, ``2 GiB``."""
    if size < _STEP:
        return f"{size:.0f} B"
    value = float(size)
    for unit in _UNITS:
        value /= _STEP
        if value < _STEP or unit == _UNITS[-1]:
            break
    decimals = next((count for below, count in _DECIMALS if value < below), 0)
    digits = f"{value:.{decimals}f}"
    return f"{digits.rstrip('0').rstrip('.') if decimals else digits} {unit}"


def share_text(part: int, whole: int) -> str:
    """Return per cent; only nothing is ``0 %``, and only all is ``100 %``."""
    if part in {0, whole} or not whole:
        return "100 %" if part else "0 %"
    percent = 100 * part / whole
    if percent < 0.05:  # noqa: PLR2004 - would be rounded to 0.0
        return "<0.1 %"
    if percent >= 99.95:  # noqa: PLR2004 - would be rounded to 100.0
        return ">99.9 %"
    return f"{percent:.1f} %"


def rate_text(rate: float) -> str:
    """Return bytes per second."""
    return f"{size_text(rate)}/s"


def time_text(seconds: float) -> str:
    """Return a time in its two largest units: ``0.4 s``, ``12 s``, ``3:05 min``, ``2:07 h``."""
    if seconds < 10:  # noqa: PLR2004 - a decimal counts below
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:  # noqa: PLR2004 - seconds of a minute
        return f"{whole} s"
    if whole < 3600:  # noqa: PLR2004 - seconds of an hour
        return f"{whole // 60}:{whole % 60:02} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02} h"


def pace_text(count: int, seconds: float) -> str:
    """Return how long so many bytes took, and their rate."""
    return f"{seconds:.1f} s, {rate_text(count / seconds if seconds else 0)}"
