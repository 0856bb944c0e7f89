# SPDX-License-Identifier: Apache-2.0
"""The server as the agent of Apache CloudStack 4.23 starts, asks and stops one of its own.

All in one booted machine, in this order. What the agent runs is here word for word.
"""

import json
import shlex
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.booted import Machine, boot
from tests.system.harness import free_port, repeatable, wait_until
from tests.system.pki import make_pki
from tests.system.service import INSTALL, WHEELS
from tests.system.skips import needs

pytestmark = needs("booting")

UNIT = "cloudstack-image-server"
#: Where the agent finds its own server, and starts it.
PARENT = "/usr/share/cloudstack-common/scripts/vm/hypervisor/kvm"
SOCKET = "/var/run/cloudstack/image-server.sock"
CERTIFICATE, KEY = "/etc/cloudstack/agent/cloud.crt", "/etc/cloudstack/agent/cloud.key"
THEIRS = "raise SystemExit('the server that came with the agent')\n"
SIZE = 16 << 20
DATA = repeatable("cloudstack").randbytes(SIZE)


class Agent:
    """What the agent does, as root of its machine."""

    def __init__(self, machine: Machine, place: Path) -> None:
        self.machine = machine
        self.place = place
        self.port = free_port()

    def bash(self, line: str) -> subprocess.CompletedProcess[str]:
        return self.machine.try_run("/bin/bash", "-c", line)

    def create(self, transfer_id: str, **config: object) -> bool:
        """Start the server if it is not running, wait for it, and register a transfer."""
        if not (self.is_active() and self.is_ready()):
            self.start()
        request = {"action": "register", "transfer_id": transfer_id, "config": config}
        return bool(self.ask(request)["status"] == "ok")

    def start(self) -> None:
        self.bash(f"systemctl reset-failed {UNIT} || true")
        if not self.is_active():
            started = self.bash(
                f"systemd-run --unit={UNIT} --property=Restart=no "
                f"--property=WorkingDirectory='{PARENT}' /usr/bin/python3 -m imageserver "
                f"--listen '127.0.0.1' --port {self.port} --tls-enabled "
                f"--tls-cert-file {CERTIFICATE} --tls-key-file {KEY}"
            )
            assert started.returncode == 0, started.stderr
        wait_until(self.is_ready, 10)

    def finalize(self, transfer_id: str) -> dict[str, Any]:
        """Unregister a transfer; stop the server if none is left, or it seems to be dead."""
        answer = self.ask({"action": "unregister", "transfer_id": transfer_id})
        left = int(answer["active_transfers"]) if answer.get("status") == "ok" else -1
        if left <= 0 and self.is_active():
            self.bash(f"systemctl stop {UNIT}")
        if left <= 0:
            self.bash(f"systemctl reset-failed {UNIT} || true")
        return answer

    def ask(self, request: dict[str, object]) -> dict[str, Any]:
        """Ask as the agent does; nothing is what a dead server answers."""
        line = shlex.quote(json.dumps(request))
        done = self.bash(f"echo {line} | socat -t5 - UNIX-CONNECT:{SOCKET}")
        return dict(json.loads(done.stdout)) if done.stdout.strip() else {}

    def is_active(self) -> bool:
        return self.bash(f"systemctl is-active --quiet {UNIT}").returncode == 0

    def is_ready(self) -> bool:
        return self.ask({"action": "status"}).get("status") == "ok"

    def serve(self, name: str, volume: str, *options: str) -> str:
        """Export a volume, with qemu-nbd as the agent starts it; return the socket."""
        path = f"/tmp/imagetransfer/{name}.sock"  # noqa: S108 - the agent's place
        self.machine.run("mkdir", "-p", "/tmp/imagetransfer")  # noqa: S108
        self.machine.run(
            *("systemd-run", f"--unit=qemu-nbd-imagetransfer-{name}", "--property=Restart=no"),
            *("qemu-nbd", "--export-name", "vda", "--socket", path, "--persistent", "--shared=0"),
            *(*options, volume),
        )
        wait_until(self.machine.path(path).is_socket)
        return path

    # A client of the transfers

    def curl(self, transfer_id: str, *options: object) -> str:
        return self.machine.run(*self.curl_command(transfer_id, *options))

    def curl_command(self, transfer_id: str, *options: object) -> list[str]:
        url = f"https://127.0.0.1:{self.port}/images/{transfer_id}"
        return ["curl", "-sS", "--cacert", "/root/pki/ca.crt", *map(str, options), url]

    def status_of(self, transfer_id: str) -> str:
        return self.curl(transfer_id, "-o", "/dev/null", "-w", "%{http_code}")


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    with boot() as machine:
        yield machine


@pytest.fixture(scope="module")
def agent(machine: Machine, workplace: Path) -> Agent:
    """An agent on whose machine its own server was replaced by this one."""
    theirs = machine.path(f"{PARENT}/imageserver")
    theirs.mkdir(parents=True)
    (theirs / "__main__.py").write_text(THEIRS)
    machine.run(INSTALL, "--cloudstack", "--wheels", WHEELS)
    # Two workers start sooner than many, and a test need not wait for 4 s.
    machine.path(f"{PARENT}/image-server.env").write_text(
        "IMAGESERVER_WORKERS=2\nIMAGESERVER_UNREGISTER_TIMEOUT=0.5\n"
    )
    make_pki(machine.path("/root/pki"))
    machine.run("mkdir", "-p", "/etc/cloudstack/agent", "/srv/volumes")
    machine.run("cp", "/root/pki/server.crt", CERTIFICATE)
    machine.run("cp", "/root/pki/server.key", KEY)
    for path in ("/srv/volumes/vda.raw", "/root/up.raw"):
        machine.path(path).write_bytes(DATA)
    # qemu-nbd's sockets are here, and its mode is none of the server's business.
    machine.run("install", "-d", "-m", "0775", "/tmp/imagetransfer")  # noqa: S108
    return Agent(machine, workplace)


def test_images_go_up_and_down_over_tls(agent: Agent) -> None:
    machine = agent.machine
    machine.run("cp", "/srv/volumes/vda.raw", "/srv/volumes/down.raw")
    sock = agent.serve("down", "/srv/volumes/down.raw", "--read-only")
    assert agent.create("down", backend="nbd", idle_timeout_seconds=600, socket=sock, export="vda")
    agent.curl("down", "-f", "-o", "/root/down.raw")
    assert machine.path("/root/down.raw").read_bytes() == DATA

    file = "/srv/volumes/new.raw"
    assert agent.create("up", backend="file", idle_timeout_seconds=600, file=file)
    told = json.loads(agent.curl("up", "-f", "-T", "/root/up.raw"))
    assert told == {"ok": True, "bytes_written": SIZE}
    assert machine.path(file).read_bytes() == DATA

    assert agent.ask({"action": "status"}) == {"status": "ok", "active_transfers": 2}
    progress = agent.ask({"action": "status", "transfer_id": "up"})
    assert (progress["bytes_written"], progress["requests_in_flight"]) == (SIZE, 0)


def test_a_client_is_offered_more_than_one_connection_to_what_the_agent_exports(
    agent: Agent,
) -> None:
    agent.machine.run("truncate", "-s", "1M", "/srv/volumes/empty.raw")
    sock = agent.serve("empty", "/srv/volumes/empty.raw")
    assert agent.create("empty", socket=sock, export="vda")
    offered = json.loads(agent.curl("empty", "-f", "-X", "OPTIONS"))

    assert min(offered["max_readers"], offered["max_writers"]) >= 4
    assert agent.finalize("empty") == {"status": "ok", "active_transfers": 2}


def test_unregistering_while_a_client_reads_ends_neither_its_request_nor_the_server(
    agent: Agent,
) -> None:
    command = agent.curl_command("down", "-f", "--limit-rate", "1M", "-o", "/root/slow.raw")
    with subprocess.Popen(agent.machine.command(*command)) as slow:
        wait_until(
            lambda: agent.ask({"action": "status", "transfer_id": "down"})["requests_in_flight"]
        )
        began = time.monotonic()
        answer = agent.finalize("down")
        assert answer == {"status": "ok", "active_transfers": 1, "busy": True}
        assert time.monotonic() - began < 4
        assert agent.status_of("down") == "404"
        assert slow.wait(20) == 0
    assert agent.machine.path("/root/slow.raw").read_bytes() == DATA
    assert agent.is_active()


@pytest.mark.parametrize("unknown", ["down", "../../etc/passwd"])
def test_unregistering_what_is_not_there_stops_nothing(agent: Agent, unknown: str) -> None:
    answer = agent.finalize(unknown)

    assert (answer["status"], answer["active_transfers"]) == ("ok", 1)
    assert agent.is_active()


def test_registrations_outlive_a_crash(agent: Agent) -> None:
    agent.machine.run("systemctl", "kill", "--signal=KILL", UNIT)
    wait_until(lambda: not agent.is_active())
    assert agent.create("other", file="/srv/volumes/new.raw", backend="file")

    assert agent.ask({"action": "status"})["active_transfers"] == 2
    assert agent.status_of("up") == "200"


def test_the_last_transfer_stops_the_server_and_its_name_is_free_at_once(agent: Agent) -> None:
    assert agent.finalize("other")["active_transfers"] == 1
    assert agent.finalize("up") == {"status": "ok", "active_transfers": 0}
    assert agent.machine.show(UNIT, "LoadState") == "not-found"
    agent.machine.run("touch", SOCKET)  # what a stranger has left

    assert agent.create("up", file="/srv/volumes/new.raw", backend="file")
    assert agent.status_of("up") == "200"


def test_a_stop_ends_what_an_agent_has_left_registered(agent: Agent) -> None:
    agent.machine.run("systemctl", "stop", UNIT)
    agent.start()

    assert agent.ask({"action": "status"}) == {"status": "ok", "active_transfers": 0}
    assert agent.status_of("up") == "404"


def test_a_second_server_is_refused_with_a_sentence(agent: Agent) -> None:
    command = f"cd '{PARENT}' && exec /usr/bin/python3 -m imageserver --port {free_port()}"
    done = agent.bash(command)

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == (
        f"imageserver: IMAGESERVER_CONTROL_SOCKET: another server listens at {SOCKET}; "
        "stop it first."
    )
    assert agent.is_ready()


def test_only_root_sees_the_state_and_no_port_shows_it(agent: Agent) -> None:
    home = agent.machine.path("/run/cloudstack/image-server")  # /var/run is a link
    listening = agent.bash(f"ss -Hltnp | grep -c 'pid={agent.machine.show(UNIT, 'MainPID')},'")

    assert (home.stat().st_mode & 0o777, home.stat().st_uid) == (0o700, 0)
    assert (home / "admin.sock").is_socket()
    assert listening.stdout == "1\n"


def test_uninstalling_gives_the_agent_its_own_server_back(agent: Agent) -> None:
    machine = agent.machine
    parent = machine.path(PARENT)
    edited = f"install: {PARENT}/image-server.env was edited and stays."
    removed = f"install: the launcher in {PARENT} is removed."

    assert machine.run(INSTALL, "--uninstall", "--cloudstack").splitlines() == [removed, edited]
    assert (parent / "imageserver" / "__main__.py").read_text() == THEIRS
    assert sorted(path.name for path in parent.iterdir()) == ["image-server.env", "imageserver"]
    assert agent.is_active()

    (parent / "image-server.env").unlink()
    machine.run(INSTALL, "--cloudstack", PARENT, "--wheels", WHEELS)
    assert machine.run(INSTALL, "--uninstall").splitlines() == [removed, "install: removed."]
    assert (parent / "imageserver" / "__main__.py").read_text() == THEIRS
    assert [path.name for path in parent.iterdir()] == ["imageserver"]
    assert not agent.is_active()
