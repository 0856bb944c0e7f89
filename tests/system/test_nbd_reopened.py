# SPDX-License-Identifier: Apache-2.0
"""A server that opens a file anew for each connection: which file a transfer reaches."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.system.harness import Server, exchange, nbdkit

KIB = 1024
SIZE = 1 << 20


@pytest.fixture(scope="module")
def server(workplace: Path) -> Iterator[Server]:
    with Server(workplace, nbd_idle_seconds=30, max_writers=4) as running:
        yield running


@pytest.mark.parametrize("second", ["the same id", "another id"])
def test_a_transfer_made_after_another_ended_reaches_what_the_server_has_now(
    server: Server, home: Path, second: str
):
    """With nbdkit, a connection has the file that had the export's name when it was made."""
    disks, sock = home / "disks", home / "s"
    disks.mkdir()
    ids = ["first", "first" if second == "the same id" else "second"]
    with nbdkit(sock, "file", f"dir={disks}"), closing(server.connect()) as connection:
        for content, name in zip((b"o", b"n"), ids, strict=True):
            (home / "new").write_bytes(content * SIZE)
            (home / "new").rename(disks / "vda")
            url = server.add(name, socket=str(sock), export="vda")
            answer = exchange(connection, "GET", url)  # whose connection is kept
            assert answer.body == content * SIZE
            if content == b"o":
                (server.config / name).unlink()
        fields = {"Range": f"bytes=0-{KIB - 1}"}
        assert exchange(connection, "PATCH", url, b"w" * KIB, headers=fields).status == 200
        assert exchange(connection, "POST", f"{url}/flush", b"").status == 200
        assert (disks / "vda").read_bytes()[: 2 * KIB] == b"w" * KIB + b"n" * KIB
