# SPDX-License-Identifier: Apache-2.0
"""Something fails once in an operation: the first call, the second ... until none is left to fail.

What fails is an injector's affair: a call of the C library, a request to an NBD server, a byte that
one sends. What is done, and what is right afterwards, is the operation's. After each fault: what
the operation checks, nothing is left behind, nothing is held, and the next request succeeds.
"""

import errno
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from proving.world import Answer, World

_OK = 200
_DONE = {_OK, 206}


@dataclass(frozen=True)
class Operation:
    """What is done under faults; ``check`` yields what is wrong about the answer."""

    name: str
    run: Callable[[World], Answer]
    check: Callable[[World, Answer], Iterable[str]]
    prepare: Callable[[World], object] = lambda _world: None
    afterwards: Callable[[World], object] = lambda _world: None
    owes: Callable[[World, Answer, str, int], Iterable[str]] = lambda *_: ()
    """Yields what is wrong, since it was this call that has failed, with this error."""


@dataclass(frozen=True)
class Fault:
    """One fault: ``call`` is what has failed, "" where nothing was left to fail."""

    what: str
    call: str
    wrong: list[str]


class NotPrepared(Exception):
    """A request that meets no fault has failed; ``str()`` is its answer."""


class Injector(Protocol):
    """What makes one thing fail: ``Faults``, or an NBD server's."""

    def arm(self, nth: int, error: int, /) -> None:
        """Let the ``nth`` from now on fail."""

    def disarm(self) -> str:
        """Let nothing fail; return what has failed, or ""."""


def once(world: World, faults: Injector, operation: Operation, nth: int, error: int) -> Fault:
    """Do it while the ``nth`` call fails; say what was wrong."""
    operation.prepare(world)
    faults.arm(nth, error)
    try:
        answer = operation.run(world)
    except OSError as exc:
        answer = Answer(500, wrong=f"{type(exc).__name__} escapes: {exc}")
    finally:
        name = faults.disarm()
    wrong = [*operation.check(world, answer), *world.left()]
    if name:
        wrong += operation.owes(world, answer, name, error)
    wrong += [answer.wrong] if answer.wrong else []
    wrong += _next(world, operation)
    operation.afterwards(world)
    return Fault(
        f"{operation.name}: {name} ({nth}) fails with {errno.errorcode.get(error, f'{error:#x}')}",
        name,
        wrong,
    )


def _next(world: World, operation: Operation) -> Iterator[str]:
    """Yield what is wrong about the next request, which meets no fault."""
    operation.afterwards(world)
    try:
        operation.prepare(world)
    except NotPrepared as exc:
        yield f"the next one fails: {exc}"
        return
    answer = operation.run(world)
    if answer.status not in _DONE or answer.wrong:
        yield f"the next one fails: {answer.status} {answer.body!r} {answer.wrong}"
    yield from operation.check(world, answer)
    if left := {path.name for path in world.images.iterdir()} - {"image", "raw"}:
        yield f"files are left: {left}"
    if left := world.registrations() - {"r"}:
        yield f"files are left: {left}"


Worlds = Callable[[], AbstractContextManager[World]]


def sweep(
    operation: Operation,
    error: int,
    faults: Injector,
    worlds: Worlds,
    *,
    step: int = 1,
) -> Iterator[Fault]:
    """Let each call of an operation, or each ``step``-th, fail in turn."""
    nth, goes_on = 1 - step, True
    while goes_on:
        with worlds() as world:  # another one where something was left behind
            for _ in range(2):  # what is imported or opened once is not part of it
                operation.prepare(world)
                operation.run(world)
                operation.afterwards(world)
            list(world.left())
            world.settle()
            while True:
                nth += step
                fault = once(world, faults, operation, nth, error)
                goes_on = bool(fault.call)
                if goes_on:
                    yield fault
                if fault.wrong or not goes_on:
                    break
