# SPDX-License-Identifier: Apache-2.0
"""A program in a pseudo-terminal, and what its screen shows at a moment of interest.

The screen is kept line by line with its colours. That is all that rich needs: it erases a line
before it writes it anew, and writes full screens from the top.
"""

import codecs
import fcntl
import io
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

from rich.console import CONSOLE_SVG_FORMAT, Console  # type: ignore[attr-defined]
from rich.text import Text

COLUMNS, ROWS = 96, 24
_TOKEN = re.compile(r"\x1b\[([?0-9;]*)([A-Za-z])|(\r?\n)|(\r)|([^\x1b\r\n]+)")
_UNFINISHED = re.compile(r"\x1b(\[[?0-9;]*)?$")
_SVG_FONTS = re.compile(r"@font-face \{\{.*?\}\}\s*", re.DOTALL)
_SECONDS = 60.0


class Screen:
    """What a terminal shows; feed it what a program writes."""

    def __init__(self, renamed: Mapping[str, str]) -> None:
        self._renamed = renamed
        self._lines = [""]
        self._row = 0

    def feed(self, text: str) -> None:
        """Take more output; sequences must not be cut."""
        for match in _TOKEN.finditer(text):
            parameters, final, newline, _return, words = match.groups()
            if newline:
                self._row += 1
                self._lines += [""] * (self._row == len(self._lines))
            elif words:
                self._lines[self._row] += words
            elif final == "m":
                self._lines[self._row] += match[0]
            elif final == "A":
                self._row = max(0, self._row - int(parameters or 1))
            elif final == "K":
                self._lines[self._row] = ""
            elif final in {"H", "J"} or (final == "h" and parameters == "?1049"):
                self._lines, self._row = [""], 0

    @property
    def text(self) -> Text:
        """What is seen, colours included, under the names that are to be shown."""
        seen = "\n".join(self._lines)
        for name, other in self._renamed.items():
            seen = seen.replace(name, other)
        shown = Text.from_ansi(seen)
        shown.rstrip()
        return shown


class Program:
    """A program whose terminal is ours; ``renamed`` is what its screen shows otherwise."""

    def __init__(self, command: Sequence[str], cwd: Path, renamed: Mapping[str, str]) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        environ = os.environ | {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
        self._running = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=environ, cwd=cwd
        )
        os.close(slave)
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._rest = ""
        self.screen = Screen(renamed)

    def until(self, is_there: Callable[[str], object]) -> Text:
        """Wait until the screen shows something, or to the end; return what it shows."""
        deadline = time.monotonic() + _SECONDS
        while not is_there(self.screen.text.plain) and self._more():
            if time.monotonic() > deadline:
                raise TimeoutError(self.screen.text.plain)
        return self.screen.text

    def _more(self) -> bool:
        if not select.select([self._master], [], [], 1)[0]:
            return True
        try:
            data = os.read(self._master, 65536)
        except OSError:  # EIO: the program has closed its end
            return False
        text = self._rest + self._decoder.decode(data)
        self._rest = match[0] if (match := _UNFINISHED.search(text)) else ""
        self.screen.feed(text.removesuffix(self._rest))
        return True

    def finish(self) -> Text:
        """Wait for the end; return what the screen shows then."""
        text = self.until(lambda _: False)
        self._running.wait(_SECONDS)
        return text

    def signal(self, number: int) -> None:
        """Send a signal, as the terminal's keys do."""
        self._running.send_signal(number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        """End it, if it has not ended."""
        self._running.kill()
        self._running.wait()
        os.close(self._master)


def svg(text: Text, title: str) -> str:
    """Draw a screen; the drawing refers to nothing outside itself."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(text, soft_wrap=True)
    form = _SVG_FONTS.sub("", CONSOLE_SVG_FORMAT)
    return console.export_svg(title=title, code_format=form, unique_id="imagectl")
