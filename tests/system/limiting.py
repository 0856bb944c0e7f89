# SPDX-License-Identifier: Apache-2.0
"""Limits on threads, set on a server that runs."""

import contextlib
import os
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path

#: Where a cgroup with a limit on tasks can be made: version 1, then 2.
_PLACES = (Path("/sys/fs/cgroup/pids"), Path("/sys/fs/cgroup"))


@contextlib.contextmanager
def _cgroup() -> Iterator[Path]:
    """Make a cgroup that limits tasks.

    Raises:
        OSError: that is not possible here.
    """
    for place in _PLACES:
        group = place / f"is-tasks-{os.getpid()}"
        with contextlib.suppress(OSError):
            group.mkdir()
            break
    else:
        raise PermissionError("no cgroup can be made")
    try:
        (group / "pids.max").write_text("max")
        yield group
    finally:
        for pid in (group / "cgroup.procs").read_text().split():
            with contextlib.suppress(OSError):
                (group.parent / "cgroup.procs").write_text(pid)
        group.rmdir()


@contextlib.contextmanager
def no_more_threads(pids: Sequence[int]) -> Iterator[None]:
    """Let these processes start no thread during a block; an rlimit would spare root."""
    with contextlib.ExitStack() as stack:
        if os.geteuid():
            for pid in pids:
                _, hard = limit = resource.prlimit(pid, resource.RLIMIT_NPROC)
                resource.prlimit(pid, resource.RLIMIT_NPROC, (0, hard))
                stack.callback(resource.prlimit, pid, resource.RLIMIT_NPROC, limit)
        else:
            group = stack.enter_context(_cgroup())
            for pid in pids:
                (group / "cgroup.procs").write_text(str(pid))
            (group / "pids.max").write_text((group / "pids.current").read_text())
        yield


def can_limit_threads() -> bool:
    """Tell whether ``no_more_threads`` works here."""
    if os.geteuid():
        return True
    try:
        with _cgroup():
            return True
    except OSError:
        return False
