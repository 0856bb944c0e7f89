# SPDX-License-Identifier: Apache-2.0
"""Arguments in, table out.

Exit status: 0 when everything was measured, whatever the figures; 1 when a row failed or bytes
were wrong. A missed target is for the reader to judge: a busy machine misses some.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from lab.model import WrongBytes
from lab.processes import LabFailed, run

from benchmark import (
    report,
    rows_checksum,
    rows_costs,
    rows_cpu,
    rows_data,
    rows_disk,
    rows_growth,
    rows_imagectl,
    rows_proxy,
    rows_qcow2,
    rows_requests,
    rows_wan,
    shares,
)
from benchmark.clients import ClientFailed
from benchmark.figures import Figure
from benchmark.world import FULL, QUICK, World

ROWS: dict[str, Callable[[World], list[Figure]]] = {
    "requests-get": rows_requests.get,
    "requests-put": rows_requests.put,
    "requests-other": rows_requests.other,
    "requests-raw": rows_requests.raw,
    "growth": rows_growth.growth,
    "cpu": rows_cpu.cpu,
    "get-nbd": rows_data.get_nbd,
    "put-nbd": rows_data.put_nbd,
    "get-file": rows_data.get_file,
    "put-file": rows_data.put_file,
    "disk": rows_disk.disk,
    "parallel": rows_data.parallel,
    "tls": rows_data.tls,
    "haproxy": rows_proxy.haproxy,
    "extents": rows_costs.extents,
    "qcow2": rows_qcow2.qcow2,
    "zero": rows_costs.zero,
    "checksum": rows_checksum.checksum,
    "digests": rows_checksum.digests,
    "memory": rows_costs.memory,
    "spread": rows_costs.spread,
    "imagectl-download": rows_imagectl.imagectl_download,
    "imagectl-upload": rows_imagectl.imagectl_upload,
    "imagectl-sparse": rows_imagectl.imagectl_sparse,
    "wan": rows_wan.wan,
}
#: Long, and of the client: not part of the whole.
_APART = {"wan"}
_FAILURES = (ClientFailed, LabFailed, WrongBytes, OSError, subprocess.CalledProcessError)


def _say(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def named(prefix: str) -> list[str]:
    """Return the rows of a name, or of the first words of several."""
    if not (found := [name for name in ROWS if f"{name}-".startswith(f"{prefix}-")]):
        raise argparse.ArgumentTypeError(f"no row {prefix}; --list names them")
    return found


def main() -> int:
    """Run the rows that are asked for."""
    parser = argparse.ArgumentParser("scripts/bench", description="Measure the image server.")
    parser.add_argument(
        "rows", nargs="*", type=named, metavar="ROW", help="these only; requests: requests-*"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    parser.add_argument("--draw", type=Path, metavar="SVG", help="only draw what a request costs")
    parser.add_argument("--quick", action="store_true", help="small sizes: does it work?")
    parser.add_argument("--list", action="store_true", help="name the rows and end")
    told = parser.parse_args()
    asked = {name for names in told.rows for name in names} or ROWS.keys() - _APART
    if told.list:
        sys.stdout.write("\n".join(ROWS) + "\n")
        return 0
    if told.draw:
        with World(QUICK if told.quick else FULL) as world:
            told.draw.write_text(shares.draw(shares.costs(world)), encoding="utf-8")
        return 0
    figures: list[Figure] = []
    try:
        with World(QUICK if told.quick else FULL) as world:
            measured = [_measured(world, name, figures) for name in ROWS if name in asked]
        return 0 if all(measured) else 1
    finally:  # of a run that is interrupted, what there is
        sys.stdout.write(report.markdown(figures, quick=told.quick))
        if told.json:
            told.json.write_text(report.as_json(figures, quick=told.quick), encoding="utf-8")


def _measured(world: World, name: str, figures: list[Figure]) -> bool:
    _say(f"{name} ...")
    began = time.monotonic()
    try:
        figures += ROWS[name](world)
    except _FAILURES as exc:
        _say(f" failed: {type(exc).__name__}: {exc}\n")
        return False
    _say(f" {time.monotonic() - began:.0f} s\n")
    return True


if __name__ == "__main__":
    run(main, "bench")
