# SPDX-License-Identifier: Apache-2.0
"""The incremental backup that docs/imagectl.md shows is one, as it stands there."""

import os
import re
import shlex
import subprocess
from pathlib import Path

from tests.system.harness import ROOT, Server, qemu_img, qemu_io
from tests.system.moving import IMAGECTL

_BLOCK = re.compile(r"^### An incremental backup$.*?^```sh\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def test_the_incremental_backup_holds_what_the_disk_held(server: Server, home: Path):
    found = _BLOCK.search((ROOT / "docs" / "imagectl.md").read_text())
    assert found
    script = found[1].replace("/tmp/imagetransfer", str(server.config))  # noqa: S108
    script = script.replace(":54323", f":{server.port}")
    (home / "imagectl").write_text(f'#!/bin/sh\nexec {shlex.join(IMAGECTL)} "$@"\n')
    (home / "imagectl").chmod(0o755)
    qemu_img("create", "-f", "qcow2", home / "vda.qcow2", "8M")
    qemu_io(home / "vda.qcow2", "qcow2", "write -P 1 0 2M")
    environ = os.environ | {
        "PATH": f"{home}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    # What has ended holds no lock of the disk any more.
    gone = "for i in {1..200}; do kill -0 $pid || break; sleep 0.05; done"
    ended = f"trap '{{ pid=$(cat vda.pid) && kill $pid && {gone}; }} 2>/dev/null || true' EXIT\n"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", ended + script],
        cwd=home,
        env=environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert "\nmonday.qcow2: 8 MiB, of which 64 KiB changed data; " in done.stdout
    assert "identical" in qemu_img("compare", home / "monday.qcow2", home / "vda.qcow2")
    qemu_io(home / "monday.qcow2", "qcow2", "read -P 1 0 1M", "read -P 7 1M 64k")
