# SPDX-License-Identifier: Apache-2.0
"""The machine of booted.py leaves nothing here."""

import subprocess
from pathlib import Path

from tests.system.booted import boot
from tests.system.skips import needs


@needs("booting")
def test_a_machine_that_is_gone_leaves_no_process_mount_or_control_group() -> None:
    with boot() as machine:
        name = Path(f"/proc/{machine.init}/cgroup").read_text().split("/is-boot-")[1].split("/")[0]
    assert not Path(f"/proc/{machine.init}").exists()
    assert name not in Path("/proc/self/mounts").read_text()
    script = 'mount -t cgroup2 cgroup2 /mnt && find /mnt -name "*$1*"'
    found = subprocess.check_output(["unshare", "--mount", "sh", "-c", script, "sh", name])
    assert found == b""
