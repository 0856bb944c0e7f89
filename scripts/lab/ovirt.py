# SPDX-License-Identifier: Apache-2.0
"""oVirt's own daemon, unmodified, on loopback with plain HTTP: what imagectl must also understand.

``scripts/bench`` compares with it. It is told which images it serves by *tickets*, through the
Unix socket of its control service. A ticket's size bounds what may be used of the image.
"""

import contextlib
import http.client
import json
import socket
import sys
import uuid
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path

from lab.processes import LabFailed, free_port, process
from lab.servers import listens

_DAEMON = Path(sys.executable).with_name("ovirt-imageio")
#: Above any test's time.
_TICKET_SECONDS = 600

_CONFIGURATION = """
[daemon]
run_dir = {home}
drop_privileges = false
systemd_enable = false
poll_interval = 0.1
max_connections = 8
[tls]
enable = false
[remote]
host = 127.0.0.1
port = {port}
[local]
socket = {home}/local
[control]
socket = {home}/control
[handlers]
keys = stderr
[logger_root]
handlers = stderr
level = INFO
"""


class OvirtDaemon:
    """A running daemon."""

    def __init__(self, home: Path, port: int, pid: int) -> None:
        self.pid = pid
        self._control = home / "control"
        self.local = home / "local"
        self.port = port

    def add_nbd(self, sock: Path, size: int, **fields: object) -> str:
        """Make a ticket for an NBD server's default export; return the image's URL."""
        return self._add({"url": f"nbd:unix:{sock}:exportname=", "size": size, **fields})

    def add_file(self, path: Path, **fields: object) -> str:
        """Make a ticket for a file; return the image's URL."""
        return self._add({"url": f"file://{path}", "size": path.stat().st_size, **fields})

    def _add(self, fields: dict[str, object]) -> str:
        name = str(uuid.uuid4())
        defaults = {"ops": ["read", "write"], "timeout": _TICKET_SECONDS, "sparse": True}
        ticket = defaults | {"uuid": name, "transfer_id": name} | fields
        with contextlib.closing(_OverUnix(self._control)) as connection:
            connection.request("PUT", f"/tickets/{name}", json.dumps(ticket))
            answer = connection.getresponse()
            if answer.status != HTTPStatus.OK:
                raise LabFailed(f"oVirt's daemon refused a ticket: {answer.read()!r}")
        return f"http://127.0.0.1:{self.port}/images/{name}"


@contextlib.contextmanager
def ovirt_daemon(home: Path) -> Iterator[OvirtDaemon]:
    """Run the daemon in a directory of its own until the block ends."""
    port = free_port()
    configuration = home / "conf.d" / "50-test.conf"
    configuration.parent.mkdir(parents=True)
    configuration.write_text(_CONFIGURATION.format(home=home, port=port))
    with process(
        [str(_DAEMON), "--conf-dir", str(home)], lambda: listens(home / "control")
    ) as running:
        yield OvirtDaemon(home, port, running.pid)


class _OverUnix(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=30)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))
