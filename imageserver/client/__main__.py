# SPDX-License-Identifier: Apache-2.0
"""Starts ``imagectl``, or says what must be installed: imports nothing before that."""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable

from imageserver.client import interrupts

#: The oldest major version of urllib3 that works; older click and rich than pyproject.toml's do.
_URLLIB3 = 2


def main() -> int:
    """Run the command line; return the exit status."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:  # noqa: PLR2004 - stderr's
        os.set_inheritable(fd, True)  # noqa: FBT003 # a closed one: no other file may get its number
    os.close(fd)
    return interrupts.run("imagectl", _load)


def _load() -> Callable[[], int]:
    if lack := _lack():
        print(  # noqa: T201 - its answer
            f"imagectl: {lack}; in imageserver's source, pip install '.[client]' "
            "or scripts/install --with-client brings it.",
            file=sys.stderr,
        )
        return lambda: 5
    from imageserver.client.commands import cli, outputs  # noqa: PLC0415 - they import the rest

    outputs.replace_outputs()
    return cli.main


def _lack() -> str | None:
    """Return what is missing or too old, if anything: a distribution may have some of it."""
    for name in ("click", "rich", "urllib3"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is missing"
    version: str = importlib.import_module("urllib3").__version__
    old = int(version.partition(".")[0]) < _URLLIB3
    return f"urllib3 {version} is too old" if old else None


if __name__ == "__main__":
    sys.exit(main())
