# SPDX-License-Identifier: Apache-2.0
"""The server as an operator has it: installed, started, reloaded and upgraded.

All in one booted machine, in this order: each test leaves the service running.
"""

import contextlib
import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.chaos.world import Prober
from tests.system.booted import Machine, boot
from tests.system.clients import putting
from tests.system.harness import ROOT, exchange, free_port, repeatable, wait_until
from tests.system.harness import process as running
from tests.system.killing import is_running
from tests.system.service import (
    ACTIVE,
    INSTALL,
    UNIT,
    WHEELS,
    Service,
    activated,
    another_source,
    control,
    installed,
    is_refused,
    transfers,
)
from tests.system.skips import needs
from tests.system.test_docs_operations import QUESTIONS

pytestmark = needs("booting")

SIZE = 32 << 20
DATA = repeatable("systemd").randbytes(1 << 20)
WHOLE = DATA * (SIZE >> 20)
OPERATIONS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
#: Where images are, of whom and with which mode: all that the unit must leave writable.
PLACES = ["/srv/images", "/var/lib/libvirt/images", "/home/images", "/tmp/images", "/mnt/later"]  # noqa: S108


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    with boot() as machine:
        yield machine


@pytest.fixture(scope="module")
def service(machine: Machine, workplace: Path) -> Service:
    """The service, installed, set up by its environment file, and running."""
    service = installed(workplace, machine)
    (check,) = re.findall(r"```sh\n(.* check\)\n)```", OPERATIONS, re.DOTALL)
    machine.run("bash", "-c", check.rpartition("```sh\n")[2])
    machine.run("systemctl", "start", "imageserver")
    return service


@pytest.fixture(scope="module")
def disk(service: Service) -> Iterator[str]:
    """An image behind qemu-nbd, reached as docs/operations.md says: by its directory's group."""
    machine = service.machine
    machine.run("install", "-d", "-m", "2770", "-o", "root", "-g", "imageserver", "/run/vm")
    machine.run("truncate", "-s", SIZE, "/run/vm/disk.raw")
    command = ["qemu-nbd", "--persistent", "--shared=16", "--format=raw", "--export-name=vda"]
    command += ["--socket=/run/vm/vda.sock", "/run/vm/disk.raw"]
    serve = machine.command("sh", "-c", 'umask 0007 && exec "$@"', "sh", *command)
    with running(serve, machine.path("/run/vm/vda.sock").is_socket):
        yield service.add("disk", socket="/run/vm/vda.sock", export="vda")


def test_start_returns_when_the_server_has_said_that_it_is_ready(service: Service) -> None:
    assert (service.request("OPTIONS", "/images/*").status, service.state) == (200, ACTIVE)
    assert service.machine.show(UNIT, "StatusText") == "Gunicorn arbiter booted"


def test_the_units_verify_where_they_are_installed(service: Service) -> None:
    units = ["imageserver.service", "imageserver.socket"]
    done = service.machine.try_run("systemd-analyze", "verify", "--man=no", *units)

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_export_is_written_and_read_inside_the_unit(service: Service, disk: str) -> None:
    assert service.request("PUT", disk, WHOLE).json == {"ok": True, "bytes_written": SIZE}
    assert service.request("GET", disk).body == WHOLE
    assert service.request("POST", f"{disk}/flush").json == {"ok": True}
    zero = json.dumps({"op": "zero", "offset": 1 << 20, "size": 30 << 20}).encode()
    json_type = {"Content-Type": "application/json"}
    assert service.request("PATCH", disk, zero, json_type).json == {"ok": True}
    assert service.request("GET", disk).body == DATA + bytes(30 << 20) + DATA
    extents = [(e["start"], e["zero"]) for e in service.request("GET", f"{disk}/extents").json]
    assert extents == [(0, False), (1 << 20, True), (31 << 20, False)]


@pytest.mark.parametrize("place", PLACES)
def test_a_file_is_replaced_inside_the_unit_wherever_it_is(service: Service, place: str) -> None:
    machine = service.machine
    machine.run("mkdir", "-p", place)
    if place == "/mnt/later":  # mounted while the service runs
        machine.run("mount", "-t", "tmpfs", "tmpfs", place)
    machine.run("install", "-d", "-o", "imageserver", "-g", "imageserver", "-m", "0750", place)
    image = machine.path(place) / "image.raw"
    url = service.add("file", backend="file", file=f"{place}/image.raw")

    assert service.request("PUT", url, DATA).json == {"ok": True, "bytes_written": len(DATA)}
    image.chmod(0o640)
    assert service.request("PUT", url, DATA[::-1]).status == 200
    assert service.request("GET", url).body == DATA[::-1] == image.read_bytes()
    assert image.stat().st_mode & 0o7777 == 0o640


def test_a_file_of_the_system_is_not_replaced(service: Service) -> None:
    machine = service.machine
    machine.run(
        "install", "-d", "-o", "imageserver", "-g", "imageserver", "/etc/imageserver/images"
    )
    url = service.add("system", backend="file", file="/etc/imageserver/images/image.raw")

    assert service.request("PUT", url, DATA).refusal == (500, "failed to access file")


def test_the_service_runs_as_its_user_with_no_capability(service: Service) -> None:
    status = service.machine.path(f"/proc/{service.main_pid}/status").read_text()
    uid = service.machine.run("id", "-u", "imageserver").strip()

    assert re.findall(r"^Uid:\t(\d+)", status, re.MULTILINE) == [uid]
    assert set(re.findall(r"^Cap(?:Prm|Eff|Bnd|Amb):\t(\w+)", status, re.MULTILINE)) == {"0" * 16}
    assert re.findall(r"^(?:NoNewPrivs|Seccomp):\t(\d)", status, re.MULTILINE) == ["1", "2"]


def test_sockets_let_in_whom_their_modes_say_and_nobody_sees_the_state(service: Service) -> None:
    nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    member = ("setpriv", "--reuid=65534", "--regid=imageserver", "--clear-groups")
    at_http = ("curl", "-fsS", "--unix-socket", "/run/imageserver/http.sock")
    at_control = 'echo \'{"action":"status"}\' | nc -U /run/imageserver/control.sock'
    machine = service.machine

    probe = machine.run(*nobody, *at_http, "-X", "OPTIONS", "http://localhost/images/*")
    assert json.loads(probe)["unix_socket"] == "/run/imageserver/http.sock"
    assert json.loads(machine.run(*member, "sh", "-c", at_control))["status"] == "ok"
    refused = machine.try_run(*nobody, "sh", "-c", at_control)
    assert (refused.stdout, refused.stderr.strip()[-17:]) == ("", "Permission denied")
    assert machine.try_run(*member, "ls", "/run/imageserver/state").returncode != 0
    assert machine.path("/run/imageserver/state").stat().st_mode & 0o777 == 0o700


def test_a_worker_killed_in_a_write_is_replaced_and_its_last_writes_are_awaited(
    service: Service, disk: str
) -> None:
    """Asking for them takes a netlink socket, which the unit must allow."""
    service.wait_for_workers()
    with putting(service, disk, SIZE, DATA) as (sock, _):
        victim = service.worker_of(sock, [*service.accepting()])
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: not is_running(victim))
        assert service.request("PUT", disk, WHOLE).status == 200
    assert service.request("GET", disk).body == WHOLE
    service.wait_for_workers()


def test_reload_loses_no_request(service: Service, disk: str) -> None:
    assert service.request("PUT", disk, WHOLE).status == 200
    main, old = service.main_pid, service.accepting()
    with contextlib.closing(service.connect()) as idle, Prober(service, disk) as prober:
        assert exchange(idle, "OPTIONS", disk).status == 200
        with transfers(service, disk, WHOLE):
            service.machine.run("systemctl", "reload", "imageserver")
            wait_until(lambda: len(service.accepting() - old) == 3, 20)
            assert exchange(idle, "OPTIONS", disk).status == 200
        wait_until(lambda: not old & set(service.machine.processes(UNIT)))
    assert (prober.failed, prober.answered > 10) == ([], True)
    assert (service.main_pid, service.state) == (main, ACTIVE)


def test_a_killed_main_process_is_replaced_and_registrations_stay(
    service: Service, disk: str
) -> None:
    config = {"socket": "/run/vm/vda.sock", "export": "vda"}
    register = {"action": "register", "transfer_id": "kept", "config": config}
    assert control(service.machine, register)["status"] == "ok"
    main, old = service.main_pid, service.machine.processes(UNIT)
    with putting(service, disk, SIZE, DATA):
        service.signal(main, signal.SIGKILL)
        wait_until(lambda: service.main_pid not in {0, main}, 20)
    wait_until(lambda: service.state == ACTIVE, 20)
    service.wait_for_workers()

    assert not set(old) & set(service.machine.processes(UNIT))
    assert service.machine.show(UNIT, "NRestarts") == "1"
    assert service.request("PUT", "/images/kept", WHOLE).status == 200
    assert service.request("GET", disk).body == WHOLE


def test_a_wrong_setting_is_one_line_in_the_journal(service: Service) -> None:
    machine = service.machine
    machine.run("systemctl", "stop", "imageserver")
    drop_in = machine.path("/run/systemd/system/imageserver.service.d/wrong.conf")
    drop_in.parent.mkdir(parents=True)
    drop_in.write_text(
        "[Service]\nRestart=no\nExecStart=\nExecStart=/usr/bin/env "
        "IMAGESERVER_MAX_READERS=0 /opt/imageserver/current/bin/gunicorn\n"
    )
    machine.run("systemctl", "daemon-reload")
    assert machine.try_run("systemctl", "start", "imageserver").returncode != 0
    (said,) = [line for line in machine.journal(UNIT) if "MAX_READERS='0' is wrong" in line]
    assert said.startswith("imageserver: IMAGESERVER_MAX_READERS=")
    shutil.rmtree(drop_in.parent)
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "start", "imageserver")
    service.wait_for_workers()


def test_an_upgrade_drops_no_transfer_and_leaves_edited_settings(
    service: Service, disk: str, workplace: Path
) -> None:
    machine = service.machine
    assert machine.run(INSTALL, "--wheels", WHEELS).splitlines() == [
        "install: /opt/imageserver/releases/1 is this version already."
    ]
    source = another_source(machine, "/root/source")
    with (source / "imageserver" / "web" / "app.py").open("a") as file:
        file.write("# newer\n")
    settings = machine.path("/etc/imageserver/imageserver.env").read_text()

    main, old = service.main_pid, set(machine.processes(UNIT))
    with Prober(service, disk) as prober:
        with transfers(service, disk, WHOLE):
            said = machine.run("/root/source/scripts/install", "--wheels", WHEELS)
            assert service.main_pid != main
            assert f"{main} finishes what it has begun" in said
            assert os.readlink(machine.path(f"/proc/{main}/cwd")) == "/opt/imageserver/releases/1"
        wait_until(lambda: not old & set(machine.processes(UNIT)), 20)
        assert service.state == ACTIVE
    assert (prober.failed, prober.answered > 10) == ([], True)
    wait_until(lambda: any("Master has been promoted" in line for line in machine.journal(UNIT)))
    new = machine.path(f"/proc/{service.main_pid}/cwd")
    assert os.readlink(new) == "/opt/imageserver/releases/2"
    assert machine.path("/etc/imageserver/imageserver.env").read_text() == settings
    assert service.request("GET", disk).body == WHOLE


def test_stop_finishes_what_runs_and_leaves_nothing_running(service: Service, disk: str) -> None:
    machine = service.machine
    with ThreadPoolExecutor(1) as pool:
        with transfers(service, disk, WHOLE):
            stopped = pool.submit(machine.run, "systemctl", "stop", "imageserver")
            wait_until(lambda: is_refused(service))
            assert service.state[0] == "deactivating"
        stopped.result()
    assert service.state == ("inactive", "dead", "success")
    assert machine.processes(UNIT) == []
    assert not machine.path("/run/imageserver/control.sock").exists()
    machine.run("systemctl", "start", "imageserver")


def test_sockets_of_systemd_start_the_server_and_lose_no_connection_to_a_restart(
    service: Service, disk: str
) -> None:
    with activated(service):
        assert service.request("GET", disk).body == WHOLE  # starts it
        assert control(service.machine, {"action": "status"})["status"] == "ok"
        with Prober(service, disk) as prober:
            service.machine.run("systemctl", "restart", "imageserver")
            before = prober.answered
            wait_until(lambda: prober.answered > before + 10)
        assert prober.failed == []


def test_sockets_of_systemd_are_handed_on_in_an_upgrade(service: Service, disk: str) -> None:
    machine = service.machine
    with activated(service):
        assert service.request("OPTIONS", disk).status == 200
        main = service.main_pid
        service.signal(main, signal.SIGUSR2)
        wait_until(lambda: service.main_pid != main, 20)
        service.signal(main, signal.SIGTERM)
        wait_until(lambda: not machine.path(f"/proc/{main}").exists(), 20)
        assert service.request("GET", disk).body == WHOLE
        assert control(machine, {"action": "status"})["status"] == "ok"


def test_sockets_of_systemd_must_be_those_of_the_settings(service: Service) -> None:
    address = f"127.0.0.1:{free_port()}"
    with activated(service, address):
        assert service.machine.try_run("systemctl", "start", "imageserver").returncode != 0
        journal = service.machine.journal(UNIT)
    (said,) = {line for line in journal if "ListenStream" in line}
    assert said.startswith("imageserver: systemd has passed 127.0.0.1:")
    assert address in said.split(", but the settings name ")[0]


#: What the journal must answer, by a part of the question; nothing took a minute.
ANSWERS = {
    "'transfer=8b0e": "transfer=8b0e op=get range=- bytes=0 status=404",
    "'request=nightly": "request=nightly-17 error=UnknownImage",
    "'error=(ImageBusy": "request=nightly-17 error=UnknownImage",
    "'finished": "",
    "-p warning": "transfer=gone op=read range=- bytes=0 status=500",
    "'Worker": "was sent SIGKILL!",
    "'error=(BackendError": "detail=\"/run/vm/none export '': connect: No such file",
}


def test_the_journal_answers_the_questions_of_the_document(service: Service) -> None:
    named = {"X-Request-Id": "nightly-17"}
    assert service.request("GET", "/images/8b0e", headers=named).status == 404
    gone = service.add("gone", socket="/run/vm/none")
    assert service.request("GET", gone).status == 500
    wait_until(lambda: any("transfer=gone" in line for line in service.machine.journal(UNIT)))

    questions = [question for question in QUESTIONS if "jq" not in question]
    for question in questions:
        (answer,) = [told for part, told in ANSWERS.items() if part in question]
        found = service.machine.try_run("bash", "-c", question)
        assert (found.stderr, answer in found.stdout) == ("", True), question
    assert len(questions) == len(ANSWERS)


def test_the_journal_has_a_line_for_each_event_and_no_traceback(service: Service) -> None:
    journal = service.machine.journal(UNIT)

    assert any(re.search(r"\[INFO\] worker \d+ accepts connections$", line) for line in journal)
    assert {
        re.sub("[0-9]+", "N", line.split("[ERROR] ")[1]) for line in journal if "[ERROR]" in line
    } == {"Worker (pid:N) was sent SIGKILL! Perhaps out of memory?"}
    assert [line for line in journal if "Traceback" in line or line.startswith(" ")] == []
