# SPDX-License-Identifier: Apache-2.0
"""The file system of the runtime directory gets full under a running server, and has room again."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.controlling import Control, file_of
from tests.system.disks import fill, runtime_of, with_runtime_of_2_mib
from tests.system.harness import Server, qemu_nbd, wait_until
from tests.system.skips import needs

FULL = (507, "no space left")
SECTOR = {"Content-Range": "bytes 0-511/*"}
SENTENCE = (
    "server state unavailable: the records of use cannot be used now: No space left on device"
)


@pytest.fixture
def server(home: Path) -> Iterator[Server]:
    (home / "one").write_bytes(b"one")
    (home / "disk").write_bytes(bytes(4096))
    running = Server(home, workers=2, control_socket=home / "control")
    with (
        qemu_nbd(home / "disk") as socket,
        with_runtime_of_2_mib(running) as server,
    ):
        server.add("file", **file_of(server, "one"))
        server.add("expiring", **file_of(server, "one"), idle_timeout_seconds=60)
        server.add("disk", socket=str(socket))
        yield server


@needs("mounts")
def test_what_needs_no_file_is_served_the_rest_is_507_and_all_is_well_when_there_is_room(
    server, home
):
    control = Control(home / "control")
    control.register("before", **file_of(server, "one"))
    workers = server.worker_pids()
    filling = runtime_of(server) / "filling"
    fill(filling)

    served = [("file", "GET"), ("file", "HEAD"), ("file", "OPTIONS")]
    served += [("expiring", "OPTIONS")]
    answers = [server.request(method, f"/images/{name}").status for name, method in served]
    assert answers == [200] * len(served)
    # A lock needs a name only, for which this file system has room.
    assert server.request("PUT", "/images/file", b"one").status == 200
    assert server.request("PUT", "/images/disk", bytes(512), SECTOR).status == 200
    assert server.request("GET", "/images/disk/extents").status == 200
    assert server.request("POST", "/images/disk/flush").status == 200
    refused = [server.request("GET", "/images/expiring") for _ in range(2)]
    assert [answer.refusal for answer in refused] == [FULL] * len(refused)
    assert {answer.headers["Retry-After"] for answer in refused} == {"1"}
    assert control.register("full", **file_of(server, "one")) == {
        "status": "error",
        "message": SENTENCE,
    }
    # What was registered before is as it was.
    assert control.status()["active_transfers"] == 1
    assert server.request("GET", "/images/before").body == b"one"
    assert control.unregister("before")["status"] == "ok"

    filling.unlink()
    assert server.request("GET", "/images/expiring").body == b"one"
    assert server.request("PUT", "/images/file", b"two").status == 200
    assert server.request("PUT", "/images/disk", bytes(512), SECTOR).status == 200
    assert server.request("GET", "/images/disk/extents").status == 200
    assert control.register("full", **file_of(server, "one"))["active_transfers"] == 1
    assert server.request("GET", "/images/full").body == b"two"
    assert server.worker_pids() == workers
    assert wait_until(lambda: "error=StateFull" in server.log)
    assert "Traceback" not in server.log
