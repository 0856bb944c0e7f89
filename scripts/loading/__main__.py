# SPDX-License-Identifier: Apache-2.0
"""Arguments in, verdict out: exit status 0, or 1 with what was unexpected."""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from loading.expected import missing
from loading.world import figures, locust, world

_MOST_SECONDS = 7 * 86400  # no limit of anything: longer is a slip of the finger
_MOST_USERS = 1000  # one process is all users; each has a connection or two
_LEAST_USERS = 9  # with fewer, locust starts no control program


def main() -> int:
    """Put load on a server, then look at what is left of it."""
    parser = argparse.ArgumentParser("scripts/load", description="Load on a server of its own.")
    parser.add_argument("seconds", nargs="?", type=_seconds, default=60, help="default 60")
    parser.add_argument("--users", type=_users, default=20, help="how many (default 20)")
    parser.add_argument("--html", type=_report, metavar="FILE", help="keep locust's report here")
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
        found = made.remains() + missing(figures(Path(scratch)))
    if found:
        sys.stdout.write("\nafterwards:\n" + "\n".join(found) + "\n")
    failed = status != 0 or bool(found)
    sys.stdout.write("\nFAILED\n" if failed else "\nok: nothing unexpected\n")
    return 1 if failed else 0


def _seconds(text: str) -> int:
    return _whole(text, 1, _MOST_SECONDS, "seconds")


def _users(text: str) -> int:
    return _whole(text, _LEAST_USERS, _MOST_USERS, "users")


def _whole(text: str, least: int, most: int, what: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text) or not least <= int(text) <= most:
        message = f"{text!r} is not a number of {what} from {least} to {most}"
        raise argparse.ArgumentTypeError(message)
    return int(text)


def _report(text: str) -> Path:
    """Locust would make missing directories, and find out at the end that it may not write."""
    path = Path(text)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} is not a file that can be written")
    return path


if __name__ == "__main__":
    try:
        exit_status = main()
    except KeyboardInterrupt:
        exit_status = 130
    sys.exit(exit_status)
