# SPDX-License-Identifier: Apache-2.0
"""The process's stdout and stderr: a stdout that cannot be written is an error of its own kind."""

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


def replace_outputs() -> None:
    """Replace ``sys.stdout`` and ``sys.stderr`` by streams that fail as described above.

    ``sys`` has None for one that was closed at the start: its descriptor is /dev/null by now.
    """
    for name, fd, kind in (("stdout", 1, _Output), ("stderr", 2, _Errors)):
        stream = getattr(sys, name)
        text = io.TextIOWrapper(
            io.BufferedWriter(kind(fd, "w", closefd=False)),
            encoding=stream.encoding if stream else "utf-8",
            errors="backslashreplace",  # an id may have characters that the locale has not
            line_buffering=bool(stream and stream.line_buffering),
        )
        setattr(sys, name, text)


def drop_output(fd: int = 1) -> None:
    """Send what is still in a stream's buffer to /dev/null: at exit it would fail again."""
    with contextlib.suppress(OSError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, fd)
        os.close(null)
