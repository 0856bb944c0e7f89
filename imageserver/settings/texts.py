# SPDX-License-Identifier: Apache-2.0
"""What a setting's text may say: parsers, each of which says what would be right."""

import math
import os
import re
from collections.abc import Callable

_MAX_PORT = 65535
_MAX_SUN_PATH = 107  #: sizeof(sun_path) less its NUL (unix(7))
#: How a setting that is on by default is turned off; an empty value counts as absent.
NONE = "none"
_YES, _NO = {"yes", "y", "on", "true", "1"}, {"no", "n", "off", "false", "0"}
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
_ADDRESS = r"unix:(/[^,\0]+|@[^,\0]+)|(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.-]+):([0-9]{1,5})"

_HOST_NAME = r"[a-z0-9]([a-z0-9._-]{0,253}[a-z0-9])?"
_ORIGIN = r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?"
#: A port that no browser writes.
_DEFAULT_PORT = r"(http://[^/]+):80|(https://[^/]+):443"


class WrongText(Exception):
    """A text is no value of its setting; ``str()`` says what is."""


def _length(name: str) -> int:
    """Return how many bytes the name of a file has."""
    return len(os.fsencode(name))


def integer(low: int, high: int) -> Callable[[str], int]:
    """Return the parser of whole numbers in these bounds."""

    def parse(text: str) -> int:
        if re.fullmatch(r"[0-9]{1,18}", text) is None or not low <= int(text) <= high:
            raise WrongText(f"a whole number from {low} to {high}")
        return int(text)

    return parse


def integer_or_none(low: int, high: int) -> Callable[[str], int | None]:
    """Return the parser of whole numbers in these bounds; ``none`` is None."""
    parse_integer = integer(low, high)

    def parse(text: str) -> int | None:
        if text.lower() == NONE:
            return None
        try:
            return parse_integer(text)
        except WrongText as exc:
            raise WrongText(f"{exc}, or none") from exc

    return parse


def seconds(low: float, high: float) -> Callable[[str], float]:
    """Return the parser of durations in these bounds."""

    def parse(text: str) -> float:
        if (
            re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,6})?", text) is None
            or not low <= float(text) <= high
        ):
            raise WrongText(f"a number of seconds from {low:g} to {high:g}")
        return float(text)

    return parse


def seconds_or_none(low: float, high: float) -> Callable[[str], float]:
    """Return the parser of durations in these bounds; ``none`` is infinite."""
    parse_seconds = seconds(low, high)

    def parse(text: str) -> float:
        if text.lower() == NONE:
            return math.inf
        try:
            return parse_seconds(text)
        except WrongText as exc:
            raise WrongText(f"{exc}, or none") from exc

    return parse


def size(low: int, high: int) -> Callable[[str], int]:
    """Return the parser of sizes in bytes in these bounds, in whole pages."""

    def parse(text: str) -> int:
        match = re.fullmatch(r"([0-9]{1,12})(?:([kmg])(?:ib)?)?", text, re.ASCII | re.IGNORECASE)
        value = int(match[1]) * _UNITS[(match[2] or "").lower()] if match else -1
        if not low <= value <= high or value % 4096:
            raise WrongText(f"a multiple of 4096 from {low} to {high} bytes, such as 512k or 1m")
        return value

    return parse


def path(text: str) -> str:
    """Return an absolute path as it is."""
    if not os.path.isabs(text):
        raise WrongText("an absolute path")
    return text


def directory(text: str) -> str:
    """Return an absolute path without a slash at its end, with which a link would be followed."""
    return path(text).rstrip("/") or "/"


def socket_path(text: str) -> str:
    """Return an absolute path that the address of a Unix socket has room for."""
    if not os.path.isabs(text) or _length(text) > _MAX_SUN_PATH:
        raise WrongText(f"an absolute path of at most {_MAX_SUN_PATH} bytes")
    return text


def paths(text: str) -> tuple[str, ...]:
    """Return absolute paths, at least one: no directory would read as any directory."""
    found = tuple(path(part.strip()) for part in text.split(",") if part.strip())
    if not found:
        raise WrongText("absolute paths separated by commas")
    return found


def origins(text: str) -> tuple[str, ...]:
    """Return origins as browsers write them (RFC 6454 section 6.2); ``*`` alone is any."""
    if text == "*":
        return ("*",)
    found = tuple(part.strip().lower() for part in text.split(",") if part.strip())
    if not found or not all(re.fullmatch(_ORIGIN, origin) for origin in found):
        raise WrongText("* alone, or origins such as https://engine.example:8443, without a path")
    return tuple(_without_default_port(origin) for origin in found)


def _without_default_port(origin: str) -> str:
    match = re.fullmatch(_DEFAULT_PORT, origin)
    return (match[1] or match[2]) if match else origin


def addresses(text: str) -> tuple[str, ...]:
    """Return addresses to listen at, at least one."""
    found = tuple(part.strip() for part in text.split(",") if part.strip())
    for address in found:
        match = re.fullmatch(_ADDRESS, address)
        if (
            match is None
            or int(match[3] or 0) > _MAX_PORT
            or _length(match[1] or "") > _MAX_SUN_PATH
        ):
            raise WrongText(
                "HOST:PORT, unix:/PATH or unix:@NAME (of at most "
                f"{_MAX_SUN_PATH} bytes), several separated by commas"
            )
    if not found:
        raise WrongText("at least one address, such as 127.0.0.1:54323")
    return found


def addresses_or_none(text: str) -> tuple[str, ...]:
    """Return addresses with ports of their own; ``none``: an empty tuple."""
    if text.lower() == NONE:
        return ()
    found = addresses(text)
    if any(re.search(r"^(?!unix:).*:0+$", address) for address in found):
        raise WrongText("addresses with a port other than 0, or none")
    return found


def host_names(text: str) -> tuple[str, ...]:
    """Return names of hosts, as ``Host`` has them without a port."""
    found = tuple(part.strip().lower() for part in text.split(",") if part.strip())
    if not found or not all(re.fullmatch(_HOST_NAME, name) for name in found):
        raise WrongText("names of hosts without a port, such as images.example, comma-separated")
    return found


def yes_or_no(text: str) -> bool:
    """Return whether a text says yes, in one of the words that settings have for it elsewhere."""
    for words, value in ((_YES, True), (_NO, False)):
        if text.lower() in words:
            return value
    raise WrongText("yes or no")


def choice(*choices: str) -> Callable[[str], str]:
    """Return the parser of one of these words, in whichever case."""

    def parse(text: str) -> str:
        if text.lower() not in choices:
            raise WrongText(" or ".join(choices))
        return text.lower()

    return parse
