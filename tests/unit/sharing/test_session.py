# SPDX-License-Identifier: Apache-2.0
"""What a command that shares does with output that nobody takes."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys
from imageserver.sharing.session import end_output
sys.stdout.write("nobody reads this")
"""


@pytest.mark.parametrize(("end", "status"), [("end_output()", 0), ("", 120)])
def test_output_that_nobody_takes_is_no_failure(end: str, status: int) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM + end],
            env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"},
            stdout=write,
            stderr=subprocess.PIPE,
            check=False,
        )
    finally:
        os.close(write)
    assert done.returncode == status, done.stderr
