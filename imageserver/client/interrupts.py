# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C at any moment of a command's life: status 130 and one sentence, no traceback.

A command imports most of what it needs after this: that takes most of a second.
"""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType

_INTERRUPTED = 130
#: Longer than any wait that begins anew, whole, in C: libnbd's poll(), half a second in local/.
_LOOK_SECONDS = 1.0


def run(program: str, load: Callable[[], Callable[[], int]]) -> int:
    """Return the exit status of a whole process; SIGINT is ignored afterwards.

    ``load`` imports, and returns what runs. While it does, SIGINT ends the process at once: nothing
    was begun, and an exception may be swallowed within an import. Later it is KeyboardInterrupt.
    SIGINT that is ignored from the start, as of a shell's `&`, stays so.
    """

    def end_at_once(_number: int, _frame: FrameType | None) -> None:
        _tell(program)
        os._exit(_INTERRUPTED)

    taken = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if taken:
        signal.signal(signal.SIGINT, end_at_once)
    command = load()
    try:
        if taken:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return command()
    except KeyboardInterrupt:
        _tell(program)
        return _INTERRUPTED
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Python's own end would show a traceback


@contextlib.contextmanager
def seen_while_waiting() -> Iterator[None]:
    """Let no signal's handler wait for longer than a second. For the main thread.

    A signal that comes just before the main thread blocks in a system call does not interrupt it.
    SIGALRM does, again and again; Python runs the handlers, and calls again (PEP 475).
    """
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    timer = signal.setitimer(signal.ITIMER_REAL, _LOOK_SECONDS, _LOOK_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *timer)


def _tell(program: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"{program}: interrupted.\n".encode())
