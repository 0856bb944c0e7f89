# SPDX-License-Identifier: Apache-2.0
"""Processes that have used up their threads or descriptors, and what they have open."""

import contextlib
import gc
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


def open_descriptors() -> set[str]:
    """Return this process's descriptors, but for those that other tests have left to be collected.

    One of those may be closed at any time, as soon as something is collected.
    """
    gc.collect()
    return set(os.listdir("/proc/self/fd"))


@contextlib.contextmanager
def no_descriptors(free: int = 0) -> Iterator[None]:
    """Let this process open only so many descriptors more; one that is closed can be had again.

    So there must be no gap below the limit that something closed a moment ago: the descriptors
    above it, once closed, would not be to be had. And nothing is collected in the block: what is
    left of other tests may hold descriptors.
    """
    held = [os.dup(2)]
    above = max(int(name) for name in os.listdir("/proc/self/fd"))
    while held[-1] < above:  # each new one is the lowest that is free
        held.append(os.dup(2))
    spare = [os.dup(2) for _ in range(free + 1)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (spare[-1], hard))
    gc.disable()
    try:
        for fd in spare:
            os.close(fd)
        yield
    finally:
        gc.enable()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in held:
            os.close(fd)
