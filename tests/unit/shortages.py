# SPDX-License-Identifier: Apache-2.0
"""Processes that have used up their threads or descriptors."""

import contextlib
import os
import resource
import threading
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def no_threads() -> Iterator[None]:
    """Let no thread start, as where a cgroup's pids.max is reached."""

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        yield


@contextlib.contextmanager
def no_descriptors(free: int = 0) -> Iterator[None]:
    """Let this process open only so many descriptors more."""
    held = [os.dup(2) for _ in range(free + 1)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Each new one is the lowest that is free.
    resource.setrlimit(resource.RLIMIT_NOFILE, (held[-1], hard))
    try:
        for fd in held:
            os.close(fd)
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
