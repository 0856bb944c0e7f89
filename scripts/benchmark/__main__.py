# SPDX-License-Identifier: Apache-2.0
"""Arguments in, table out.

Exit status: 0 when everything was measured, whatever the figures; 1 when a row failed or bytes
were wrong. A missed target is for the reader to judge: a busy machine misses some.
"""

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import report
import rows_bounds
import rows_data
import rows_imagectl
import rows_proxy
from clients import ClientFailed
from figures import Figure
from process import ServerFailed
from verify import WrongBytes
from world import FULL, QUICK, World

Row = Callable[[World], list[Figure]]

ROWS: dict[str, Row] = {
    "get-nbd": rows_data.get_nbd,
    "put-nbd": rows_data.put_nbd,
    "get-file": rows_data.get_file,
    "put-file": rows_data.put_file,
    "parallel": rows_data.parallel,
    "small": rows_data.small,
    "tls": rows_data.tls,
    "haproxy": rows_proxy.haproxy,
    "options": rows_bounds.options,
    "extents": rows_bounds.extents,
    "zero": rows_bounds.zero,
    "memory": rows_bounds.memory,
    "spread": rows_bounds.spread,
    "imagectl-download": rows_imagectl.imagectl_download,
    "imagectl-upload": rows_imagectl.imagectl_upload,
    "imagectl-sparse": rows_imagectl.imagectl_sparse,
}
_FAILURES = (ClientFailed, ServerFailed, WrongBytes, OSError, subprocess.CalledProcessError)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("scripts/bench", description="Measure the image server.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    parser.add_argument("--only", action="append", choices=ROWS, help="this row; repeatable")
    parser.add_argument("--quick", action="store_true", help="small sizes: does it work?")
    parser.add_argument("--list", action="store_true", help="name the rows and end")
    return parser.parse_args()


def _say(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def _measure(world: World, names: list[str]) -> tuple[list[Figure], list[str]]:
    """Return the figures, and the rows that failed."""
    figures: list[Figure] = []
    failed = []
    for name in names:
        _say(f"{name} ...")
        began = time.monotonic()
        try:
            figures += ROWS[name](world)
        except _FAILURES as exc:
            failed.append(name)
            _say(f" failed: {type(exc).__name__}: {exc}\n")
        else:
            _say(f" {time.monotonic() - began:.0f} s\n")
    return figures, failed


def main() -> int:
    """Run the rows that are asked for."""
    arguments = _arguments()
    if arguments.list:
        sys.stdout.write("\n".join(ROWS) + "\n")
        return 0
    # SIGTERM unwinds like Ctrl-C, so that servers end and images go.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    names = [name for name in ROWS if not arguments.only or name in arguments.only]
    with World(QUICK if arguments.quick else FULL) as world:
        figures, failed = _measure(world, names)
    sys.stdout.write(report.markdown(figures, quick=arguments.quick))
    if arguments.json:
        text = report.as_json(figures, quick=arguments.quick)
        arguments.json.write_text(text, encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        status = main()
    except KeyboardInterrupt:
        status = 130
    except ServerFailed as exc:
        _say(f"bench: {exc}\n")
        status = 1
    sys.exit(status)
