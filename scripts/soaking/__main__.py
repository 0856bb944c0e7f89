# SPDX-License-Identifier: Apache-2.0
"""Arguments in, verdict out: exit status 0, or 1 with the seed and what led to the failure."""

import argparse
import contextlib
import secrets
import subprocess
import sys

from lab.processes import ROOT

from soaking import reloading
from soaking.chaos import Trace
from soaking.storm import SETTINGS, Storm


def main() -> int:
    """Run the storm."""
    parser = argparse.ArgumentParser("scripts/soak", description="A storm against the server.")
    parser.add_argument("--minutes", type=float, default=10, help="how long (default 10)")
    parser.add_argument("--seed", type=int, help="of every choice the storm makes")
    parser.add_argument("--pace", type=float, default=1.5, help="mean seconds between two deaths")
    parser.add_argument("--writers", type=int, default=1, help="MAX_WRITERS (default 1)")
    parser.add_argument("--reload", action="store_true", help="only reload, once a second")
    arguments = parser.parse_args()
    seed = secrets.randbelow(1 << 32) if arguments.seed is None else arguments.seed
    options = vars(arguments) | {"seed": seed, "commit": _commit()} | SETTINGS
    told = ", ".join(f"{name} {value}" for name, value in options.items())
    sys.stdout.write(f"soak: {told}\n")
    sys.stdout.flush()
    trace = Trace()
    if arguments.reload:
        reloading.run(arguments.minutes * 60, seed, trace)
    else:
        storm = Storm(seed, trace, arguments.writers)
        storm.run(arguments.minutes * 60, arguments.pace)
        late, latest = storm.slowest_probes()
        sys.stdout.write(f"OPTIONS: 99 % within {late * 1000:.0f} ms, all within {latest:.2f} s\n")
        sys.stdout.write(f"as the NBD servers saw it: {storm.seen}\n")
    for name, count in sorted(trace.counts.items()):
        sys.stdout.write(f"{count:8} {name}\n")
    if trace.failures:
        failures = "\n".join(trace.failures[:20])
        sys.stdout.write(f"\ntrace:\n{trace.text()}\n\nFAILED, seed {seed}:\n{failures}\n")
        return 1
    sys.stdout.write("ok\n")
    return 0


def _commit() -> str:
    """Return the commit of these files, with a "+" where they have been changed."""
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=12"]
    with contextlib.suppress(OSError):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return done.stdout.strip()
    return "unknown"


if __name__ == "__main__":
    sys.exit(main())
