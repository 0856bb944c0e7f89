# SPDX-License-Identifier: Apache-2.0
"""The process's stdout and stderr: a stdout that cannot be written is an error of its own kind.

So is one that was closed from the start, as by a shell's ``>&-``.
"""

import contextlib
import io
import os
import sys
from typing import Any

from imageserver.client.failures import OutputLost, OutputUnread


class _Output(io.FileIO):
    """Standard output; its errors are ``OutputLost``, and not mistaken for another file's."""

    def write(self, data: Any) -> int:  # noqa: ANN401 - any buffer
        try:
            return super().write(data)
        except BrokenPipeError as exc:
            raise OutputUnread("nobody reads the output any more") from exc
        except OSError as exc:
            raise OutputLost(f"the output cannot be written: {exc.strerror}") from exc


class _Errors(io.FileIO):
    """Standard error; its own errors are ignored: no work fails because a message is lost."""

    def write(self, data: Any) -> int:  # noqa: ANN401 - any buffer
        with contextlib.suppress(OSError):
            return super().write(data)
        return len(data)


def open_closed() -> None:
    """Open the standard streams that were closed at the start, for which ``sys`` has None.

    No other file may get their numbers. What is written to stdout fails, as to a full disk, for
    it is open for reading; what is written to stderr is lost.
    """
    for fd, name, flags in (
        (0, "stdin", os.O_RDONLY),
        (1, "stdout", os.O_RDONLY),
        (2, "stderr", os.O_WRONLY),
    ):
        if getattr(sys, name) is not None:
            continue
        opened = os.open(os.devnull, flags)
        if opened != fd:
            os.dup2(opened, fd)
            os.close(opened)
        os.set_inheritable(fd, True)  # noqa: FBT003 - its signature
        stream = open(fd, "w" if fd else "r", encoding="utf-8", closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)


def replace_outputs() -> None:
    """Replace ``sys.stdout`` and ``sys.stderr`` by streams that fail as described above."""
    for name, fd, kind in (("stdout", 1, _Output), ("stderr", 2, _Errors)):
        stream = getattr(sys, name)
        text = io.TextIOWrapper(
            io.BufferedWriter(kind(fd, "w", closefd=False)),
            encoding=stream.encoding,
            errors="backslashreplace",  # an id may have characters that the locale has not
            line_buffering=stream.line_buffering,
        )
        setattr(sys, name, text)


def drop_output(fd: int = 1) -> None:
    """Send what is still in a stream's buffer to /dev/null: at exit it would fail again."""
    with contextlib.suppress(OSError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, fd)
        os.close(null)
