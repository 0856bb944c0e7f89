# SPDX-License-Identifier: Apache-2.0
"""Arguments in, verdict out: exit status 0, or 1 with what was unexpected."""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from loading.world import locust, world


def main() -> int:
    """Put load on a server, then look at what is left of it."""
    parser = argparse.ArgumentParser("scripts/load", description="Load on a server of its own.")
    parser.add_argument("seconds", nargs="?", type=_positive, default=60, help="default 60")
    parser.add_argument("--users", type=int, default=20, help="how many (default 20)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="keep locust's report here")
    arguments = parser.parse_args()
    # SIGTERM unwinds like Ctrl-C, so that servers end and images go.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with world(os.environ) as made, tempfile.TemporaryDirectory(prefix="load-") as scratch:
        try:
            status = locust(
                made.parameters, arguments.seconds, arguments.users, Path(scratch), arguments.html
            )
        except subprocess.TimeoutExpired:
            status = 1
            sys.stdout.write("locust did not end\n")
        remains = made.remains()
    if remains:
        sys.stdout.write("\nafterwards:\n" + "\n".join(remains) + "\n")
    failed = status != 0 or bool(remains)
    sys.stdout.write("\nFAILED\n" if failed else "\nok: nothing unexpected\n")
    return 1 if failed else 0


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds")
    return value


if __name__ == "__main__":
    try:
        exit_status = main()
    except KeyboardInterrupt:
        exit_status = 130
    sys.exit(exit_status)
