# SPDX-License-Identifier: Apache-2.0
"""A server in the states that docs/operations.md is about, one section's after the other."""

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.system.clients import putting
from tests.system.controlling import Control
from tests.system.harness import Server, free_port, program, qemu_nbd, repeatable, wait_until
from tests.system.watching import Admin

SIZE = 64 << 20
HALF = repeatable("operating").randbytes(1 << 20) * (SIZE >> 21)


class World:
    """A server with two exports, and where all of it is in place of the document's."""

    def __init__(self, home: Path) -> None:
        self.home = home
        port = free_port()
        self.server = Server(
            home,
            workers=2,
            runtime_dir=home / "run" / "state",
            control_socket=home / "run" / "control.sock",
            admin_bind=f"127.0.0.1:{port},unix:{home}/run/admin.sock",
        )
        self._admin = Admin(port)
        self._after = contextlib.ExitStack()
        self._places = {
            "127.0.0.1:54323": f"127.0.0.1:{self.server.port}",
            ":54323": f":{self.server.port}",
            "127.0.0.1:54324": f"127.0.0.1:{port}",
            "/run/imageserver": str(home / "run"),
            "/run/imagetransfer": str(self.server.config),
            "/run/vm": str(home / "vm"),
        }

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for name in ("run", "vm"):
                (self.home / name).mkdir()
            for name in ("vda", "vdb"):
                with (self.home / name).open("wb") as file:
                    file.truncate(SIZE)
                sock = self.home / "vm" / f"{name}.sock"
                stack.enter_context(qemu_nbd(self.home / name, export="vda", sock=sock))
            stack.enter_context(self.server)
            stack.callback(self.leave)
            yield

    def here(self, text: str) -> str:
        """Put what is here in place of the document's addresses, paths and processes."""
        for documented, actual in self._places.items():
            text = re.sub(rf"(?<![\w.]){re.escape(documented)}(?!\d)", actual, text)
        return text

    def run(self, code: str) -> str:
        command = ["bash", "-euo", "pipefail", "-c", self.here(code)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
        assert (done.returncode, done.stderr) == (0, ""), code
        return done.stdout

    def enter(self, section: str) -> None:
        """Be as a section of the document says; stay as it was where it says nothing."""
        scene = _SCENES.get(section)
        if scene:
            self.leave()
            wait_until(lambda: self._admin.transfers() == [])
            scene(self)

    def leave(self) -> None:
        self._after.close()

    def _stuck(self) -> None:
        """Have a client that takes nothing, and one whose NBD server is stopped."""
        sock = self.home / "vm" / "vda.sock"
        control = Control(self.home / "run" / "control.sock")
        assert control.register("8b0e", socket=str(sock), export="vda")["status"] == "ok"
        named = {"Range": "bytes=0-65535", "X-Request-Id": "nightly-17"}
        assert self.server.request("GET", "/images/8b0e", headers=named).status == 206
        self._read_nothing_of("8b0e")
        url = self.server.add("51c2", socket=str(sock.with_name("vdb.sock")), export="vda")
        writer, _ = self._after.enter_context(putting(self.server, url, SIZE, HALF))
        # All of that is written: the NBD server, once stopped, has read nothing of what follows.
        wait_until(lambda: (self.home / "vdb").stat().st_blocks * 512 >= SIZE // 2)
        wait_until(lambda: self._admin.transfers()[1]["done"])
        pid = self._server_of("vdb.sock")
        os.kill(pid, signal.SIGSTOP)
        self._after.callback(os.kill, pid, signal.SIGCONT)
        writer.settimeout(0.5)
        with contextlib.suppress(TimeoutError):
            writer.sendall(HALF[1:])
        wait_until(self._has_settled)
        worker = self._admin.transfers()[1]["worker"]
        self._places |= {"4242": str(pid), "4711": str(worker)}

    def _read_nothing_of(self, name: str) -> None:
        others = len(self._admin.transfers())
        head = f"GET /images/{name} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        self._after.enter_context(self.server.raw(head))
        wait_until(lambda: len(rows := self._admin.transfers()) > others and rows[-1]["done"])

    def _has_settled(self) -> bool:
        """Tell whether both clients wait, and nothing else is left of what was before."""
        clients = _sockets("-tn", f"sport = :{self.server.port}")
        exports = [line for line in _sockets("-xn") if f"{self.home}/vm/" in " ".join(line)]
        unread = sorted(int(line[2]) > 0 for line in exports)
        return len(clients) == 2 and unread == [False, True]

    def _server_of(self, sock: str) -> int:
        path = f"{self.home}/vm/{sock}"
        (line,) = [line for line in _sockets("-xlp") if path in line]
        return int(re.findall(r"pid=(\d+)", line[-1])[0])

    def _not_ready(self) -> None:
        self.server.config.chmod(0o777)
        self._after.callback(self.server.config.chmod, 0o700)

    def _full(self) -> None:
        """Have every read slot taken."""
        self.server.add("77aa", socket=str(self.home / "vm" / "vda.sock"), export="vda")
        for _ in range(8):
            self._read_nothing_of("77aa")
        assert self.server.request("GET", "/images/77aa").status == 503


def _sockets(*options: str) -> list[list[str]]:
    """Return the columns of what ss prints, without its head."""
    said = subprocess.check_output([program("ss"), "-H", *options], text=True)
    return [line.split() for line in said.splitlines()]


_SCENES: dict[str, Callable[[World], None]] = {
    "Watch": World._stuck,
    "Not ready": World._not_ready,
    "Clients are refused": World._full,
    "A back end fails": World.leave,
}
