# SPDX-License-Identifier: Apache-2.0
"""Which proof, and how much of it, in; what was wrong, and exit status 0 or 1, out."""

import argparse
import collections
import errno
import itertools
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from lab import faults

from proving import calls, evil, exports, parsers, power

#: What the test suite has time for.
_QUICK = ("PUT", "register", "slot table", "metrics", "cached raw PATCH", "raw qcow2")
_QUICK_EXPORTS = ("GET", "PUT", "zero", "extents")


def _calls(names: list[str], *, quick: bool) -> Iterator[tuple[str, list[str]]]:
    """Yield each fault, as its operation, and what was wrong."""
    errors = (errno.EIO,) if quick else calls.ERRORS
    for fault in calls.run(errors, names or (_QUICK if quick else ())):
        yield fault.what, fault.wrong


def _exports(names: list[str], *, quick: bool) -> Iterator[tuple[str, list[str]]]:
    errors = (errno.EIO,) if quick else exports.ERRORS
    with tempfile.TemporaryDirectory(prefix="is-proof-") as place:
        wanted = names or (_QUICK_EXPORTS if quick else ())
        for fault in exports.run(Path(place), errors, wanted, calls=not quick):
            yield fault.what, fault.wrong


def _power(names: list[str], *, quick: bool) -> Iterator[tuple[str, list[str]]]:
    for seed in range(1 if quick else 20):
        yield from power.run(seed, tuple(names))


def _evil(names: list[str], *, quick: bool) -> Iterator[tuple[str, list[str]]]:
    with tempfile.TemporaryDirectory(prefix="is-proof-") as place:
        kinds = (evil.CUT, 0x80) if quick else evil.KINDS
        wanted = names or (("GET",) if quick else ())
        for fault in evil.run(Path(place), kinds, wanted, step=13 if quick else 1):
            yield fault.what, fault.wrong


def _parsers(names: list[str], *, quick: bool) -> Iterator[tuple[str, list[str]]]:
    """Take each name as a seed."""
    for seed in names or (["1"] if quick else map(str, range(20))):
        with tempfile.TemporaryDirectory(prefix="is-proof-") as place:
            yield from parsers.run(Path(place), seed, 1000 if quick else 3000)


_PROOFS = {
    "calls": _calls,
    "exports": _exports,
    "power": _power,
    "evil": _evil,
    "parsers": _parsers,
}


def main() -> int:
    """Run one proof."""
    parser = argparse.ArgumentParser("scripts/prove", description="Every fault of a kind in turn.")
    parser.add_argument("proof", choices=_PROOFS)
    parser.add_argument("names", nargs="*", help="only these operations; of parsers: these seeds")
    parser.add_argument("--quick", action="store_true", help="what the test suite has time for")
    arguments = parser.parse_intermixed_args()
    if not faults.is_loaded():
        _with_faults()
    # It is loaded, and not for the programs that are started here.
    shutil.rmtree(Path(os.environ.pop(faults.VARIABLE)).parent)
    logging.disable(logging.CRITICAL)  # thousands of failures are what is wanted
    counted: collections.Counter[str] = collections.Counter()
    failures = []
    began = time.monotonic()
    for what, wrong in _PROOFS[arguments.proof](arguments.names, quick=arguments.quick):
        counted[what.partition(":")[0]] += 1
        failures += [f"{what}: {text}" for text in wrong]
    for name, count in counted.items():
        sys.stdout.write(f"{count:8} {name}\n")
    sys.stdout.write("".join(f"{text}\n" for text in itertools.islice(failures, 50)))
    sys.stdout.write(f"{len(failures)} failures in {time.monotonic() - began:.1f} s\n")
    return 1 if failures or not counted else 0


def _with_faults() -> NoReturn:
    """Become this program again, with the library."""
    environ = os.environ | faults.build(Path(tempfile.mkdtemp(prefix="is-proof-")))
    command = [sys.executable, "-m", "proving", *sys.argv[1:]]
    os.execve(sys.executable, command, environ)  # noqa: S606 - there is none to go through


if __name__ == "__main__":
    sys.exit(main())
