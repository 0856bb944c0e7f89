# SPDX-License-Identifier: Apache-2.0
"""Arguments in, verdict out: exit status 0, or 1 with what was unexpected."""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from lab.processes import run
from lab.remains import remains

from loading.report import missing
from loading.world import figures, locust, world


def main() -> int:
    """Put load on a server, then look at what is left of it."""
    parser = argparse.ArgumentParser("scripts/load", description="Load on a server of its own.")
    # No limit of anything: longer is a slip of the finger.
    seconds = _whole("seconds", 1, 7 * 86400)
    # With fewer, locust starts no control program; one process is all users.
    users = _whole("users", 9, 1000)
    parser.add_argument("seconds", nargs="?", type=seconds, default=60, help="default 60")
    parser.add_argument("--users", type=users, default=20, help="how many (default 20)")
    parser.add_argument("--html", type=_report, metavar="FILE", help="keep locust's report here")
    told = parser.parse_args()
    with world() as made, tempfile.TemporaryDirectory(prefix="load-") as name:
        scratch = Path(name)
        try:
            status = locust(made.parameters, told.seconds, told.users, scratch, told.html)
        except subprocess.TimeoutExpired:
            status = 1
            sys.stdout.write("locust did not end\n")
        found = remains(made.server) + made.strays() + missing(figures(scratch))
    if found:
        sys.stdout.write("\nafterwards:\n" + "\n".join(found) + "\n")
    failed = status != 0 or bool(found)
    sys.stdout.write("\nFAILED\n" if failed else "\nok: nothing unexpected\n")
    return 1 if failed else 0


def _whole(what: str, least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch("[0-9]{1,9}", text) or not least <= int(text) <= most:
            message = f"{text!r} is not a number of {what} from {least} to {most}"
            raise argparse.ArgumentTypeError(message)
        return int(text)

    return parse


def _report(text: str) -> Path:
    """Locust would make missing directories, and find out at the end that it may not write."""
    path = Path(text)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} is not a file that can be written")
    return path


if __name__ == "__main__":
    run(main, "scripts/load")
