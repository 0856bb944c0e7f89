# SPDX-License-Identifier: Apache-2.0
"""Starts ``imagectl``, or says what must be installed: imports nothing before that."""

import importlib
import importlib.util
import sys
from collections.abc import Callable

from imageserver.client import interrupts

#: The oldest major version of urllib3 that works; older click and rich than pyproject.toml's do.
_URLLIB3 = 2


def main() -> int:
    """Run the command line; return the exit status."""
    return interrupts.run("imagectl", _load)


def _load() -> Callable[[], int]:
    from imageserver.client.commands import outputs  # noqa: PLC0415 - after Ctrl-C is taken care of

    outputs.open_closed()
    if lack := _lack():
        print(  # noqa: T201 - its answer
            f"imagectl: {lack}; in imageserver's source, pip install '.[client]' "
            "or scripts/install --with-client brings it.",
            file=sys.stderr,
        )
        return lambda: 5
    from imageserver.client.commands import cli  # noqa: PLC0415 - it imports the rest

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
