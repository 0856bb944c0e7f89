# SPDX-License-Identifier: Apache-2.0
"""Integers from clients and control programs: each has a bound where it is parsed.

An offset in an image is *cut short*: far beyond the end is beyond the end. A length that is
announced is *refused*: nothing has room for it.
"""

#: Largest size of a file or image, in bytes: off_t, and what NBD's own limit allows.
MAX_SIZE = 2**63 - 1
#: Longer numbers all mean "beyond anything": int() of more digits takes its time, and of
#: more than 4300 is refused by the interpreter.
_MAX_DIGITS = 40
#: Larger than every size.
BEYOND: int = 10**_MAX_DIGITS


def cut_short(digits: str) -> int:
    """Return the number that ``[0-9]+`` stands for, at most ``BEYOND``; in bounded time."""
    digits = digits.lstrip("0")
    return BEYOND if len(digits) > _MAX_DIGITS else int(digits or "0")
