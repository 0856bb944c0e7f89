# SPDX-License-Identifier: Apache-2.0
"""docs/backup.md is true: its lines run as they stand, and each backup is the disk as it was."""

import os
import subprocess
from pathlib import Path

from tests.system.harness import ROOT, qemu_img, qemu_io
from tests.system.test_docs_api import FENCE

DOCUMENT = (ROOT / "docs" / "backup.md").read_text(encoding="utf-8")


def test_the_backups_hold_what_the_disk_held_and_are_restored(home: Path) -> None:
    (home / "t").mkdir()
    environ = {k: v for k, v in os.environ.items() if not k.startswith("IMAGESERVER_")}
    path = f"{ROOT / '.venv' / 'bin'}:{environ['PATH']}"
    script = "".join(code for language, code in FENCE.findall(DOCUMENT) if language == "sh")
    ended = "trap '{ kill $(jobs -p); wait; } 2>/dev/null || true' EXIT\n"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", ended + script],
        cwd=home,
        env=environ | {"PATH": path, "TMPDIR": str(home / "t")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    restored = ("-f", "raw", "-F", "qcow2", home / "restored.raw")
    for backup in ("monday.qcow2", "vda.qcow2"):
        assert "identical" in qemu_img("compare", *restored, home / backup)
    qemu_io(home / "full.qcow2", "qcow2", "read -P 1 0 8M")
    qemu_io(home / "tuesday.qcow2", "qcow2", "read -P 1 2M 2M", "read -P 0 4M 1M")
    small = [(home / name).stat().st_size for name in ("monday.qcow2", "tuesday.qcow2")]
    assert max(small) < 1 << 20
    assert list((home / "t").iterdir()) == []
