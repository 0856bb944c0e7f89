# SPDX-License-Identifier: Apache-2.0
"""What scripts/install makes, keeps and removes, above all where something is in the way.

All in one booted machine, in this order: the service runs until it is removed.
"""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.booted import Machine, boot
from tests.system.harness import repeatable
from tests.system.service import ACTIVE, INSTALL, UNIT, WHEELS, Service, another_source
from tests.system.skips import needs

pytestmark = needs("booting")

DATA = repeatable("install").randbytes(1 << 20)
#: Every place where scripts/install puts something.
WHERE = [
    "/opt/imageserver",
    "/etc/imageserver",
    "/run/imageserver",
    "/usr/local/lib/systemd/system/imageserver.service",
    "/usr/local/lib/systemd/system/imageserver.socket",
    "/usr/local/lib/tmpfiles.d/imageserver.conf",
    "/run/imageserver-install.lock",
    "/usr/local/share/man/man1/imageserver.1",
    "/usr/local/share/man/man1/imagectl.1",
]
#: What installs in the machine, which asks no package index.
WITH_CLIENT = [INSTALL, "--with-client", "--wheels", WHEELS]
#: As docs/operations.md and docs/imagectl.md say where it is; anybody may use it.
IMAGECTL = ["/opt/imageserver/current/bin/imagectl"]
NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    with boot() as machine:
        yield machine


@pytest.fixture(scope="module")
def service(machine: Machine, workplace: Path) -> Service:
    """The service, installed by somebody with a strict umask, with edited settings, running."""
    service = Service(workplace, machine)
    machine.run("sh", "-c", 'umask 077 && "$@"', "sh", *WITH_CLIENT)
    with machine.path("/etc/imageserver/imageserver.env").open("a") as file:
        file.write(f"IMAGESERVER_BIND=127.0.0.1:{service.port}\n")
        file.write("IMAGESERVER_ADMIN_BIND=none\nIMAGESERVER_WORKERS=1\n")
    machine.run("systemctl", "start", "imageserver")
    return service


def releases(machine: Machine) -> list[str]:
    """Return the releases that there are, and then the current one."""
    found = sorted(os.listdir(machine.path("/opt/imageserver/releases")), key=int)
    return [*found, os.readlink(machine.path("/opt/imageserver/current")).rpartition("/")[2]]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--wheels"], "--wheels wants a DIR."),
        (["--with-client", "--download"], "--download wants a DIR."),
        (["--wheels", "/", "--uninstall"], "--wheels --uninstall exclude each other."),
        (["--wheels", "/", "more"], "unknown option more; "),
    ],
    ids=["no wheels", "nowhere to download to", "two ways", "unknown"],
)
def test_words_that_make_no_sense_install_nothing(
    machine: Machine, words: list[str], said: str
) -> None:
    done = machine.try_run(INSTALL, *words)

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"install: {said}")
    assert [path for path in WHERE if os.path.lexists(machine.path(path))] == []


def test_the_umask_of_who_installs_hides_nothing_from_the_service(service: Service) -> None:
    public = [*WHERE[3:6], *(f"/opt/imageserver/{path}" for path in ("releases", "releases/1"))]
    modes = [service.machine.path(path).stat().st_mode for path in public]
    hidden = [path for path, mode in zip(public, modes, strict=True) if not mode & 0o004]

    assert hidden == []


def test_anybody_can_download_with_the_client_that_was_asked_for(service: Service) -> None:
    machine = service.machine
    machine.path("/srv/image.raw").write_bytes(DATA)
    machine.run("install", "-d", "-o", "65534", "/srv/copies")
    image = service.add("image", backend="file", file="/srv/image.raw")
    url, copy = f"http://127.0.0.1:{service.port}{image}", "/srv/copies/image.raw"
    version = machine.run(*NOBODY, *IMAGECTL, "--version")
    said = machine.run(*NOBODY, *IMAGECTL, "download", "--verify", url, copy)

    assert re.fullmatch(r"imagectl, version [0-9.]+\n", version)
    assert re.fullmatch(rf"{copy}: 1 MiB, of which 1 MiB data; .*, verified by checksum\n", said)
    assert machine.path(copy).read_bytes() == DATA


def test_anybody_can_read_the_manual(service: Service) -> None:
    page = service.machine.run(*NOBODY, "cat", "/usr/local/share/man/man1/imagectl.1")

    assert ".TH IMAGECTL 1" in page


def test_an_upgrade_that_does_not_start_leaves_all_as_it_was(service: Service) -> None:
    machine, main = service.machine, service.main_pid
    unit = machine.path("/usr/local/lib/systemd/system/imageserver.service")
    before = (unit.read_text(), releases(machine))
    broken = another_source(machine, "/root/it's broken")
    with (broken / "conf" / "imageserver.service").open("a") as file:
        file.write("# of a release that does not start\n")
    with (broken / "gunicorn.conf.py").open("a") as file:
        file.write("raise SystemExit('imageserver: does not start')\n")
    done = machine.try_run("/root/it's broken/scripts/install", "--wheels", WHEELS)

    said = (
        "install: /opt/imageserver/releases/2 does not start (journalctl -u imageserver); "
        "/opt/imageserver/releases/1 serves on.\n"
    )
    assert (done.returncode, done.stderr) == (1, said)
    assert (unit.read_text(), releases(machine)) == before == (before[0], ["1", "1"])
    assert (service.main_pid, service.state) == (main, ACTIVE)
    assert service.request("OPTIONS", "/images/*").status == 200


def test_a_stopped_service_keeps_its_release_and_interrupted_installs_leave_none(
    service: Service,
) -> None:
    machine = service.machine
    machine.run("systemctl", "stop", "imageserver")
    for number in (7, 8, 9):
        machine.run("mkdir", f"/opt/imageserver/releases/{number}")
    machine.run("touch", *(f"/opt/imageserver/releases/{number}/.stamp" for number in (7, 8)))
    said = machine.run(*WITH_CLIENT).splitlines()

    assert said[0] == "install: /opt/imageserver/releases/1 is this version already."
    assert releases(machine) == ["1", "7", "8", "1"]

    shutil.rmtree(machine.path("/opt/imageserver/releases/1/bin"))
    said = machine.run(*WITH_CLIENT).splitlines()
    assert said[:2] == [
        "install: /opt/imageserver/releases/1 is this version, but does not load.",
        "install: made /opt/imageserver/releases/9.",
    ]
    assert releases(machine) == ["8", "9", "9"]
    machine.run("systemctl", "start", "imageserver")


def test_an_install_without_the_client_says_that_it_is_gone_and_so_does_imagectl(
    service: Service,
) -> None:
    machine = service.machine
    # Where the distribution has one of the client's packages, pip leaves it out of a release.
    (urllib3,) = machine.path("/opt/imageserver/releases/9/lib").glob("*/site-packages/urllib3")
    shutil.rmtree(urllib3)
    said = machine.run(INSTALL, "--wheels", WHEELS).splitlines()
    done = machine.try_run(*NOBODY, *IMAGECTL, "--version")

    assert said[0] == "install: made /opt/imageserver/releases/10."
    assert said[-1] == "install: imagectl is left out; scripts/install --with-client brings it."
    sentence = r"imagectl: .* is (missing|too old); .*scripts/install --with-client brings it\.\n"
    assert (done.returncode, done.stdout) == (5, "")
    assert re.fullmatch(sentence, done.stderr)


@pytest.mark.parametrize(
    "way", [["--wheels", str(WHEELS)], ["--uninstall"]], ids=lambda way: way[0]
)
def test_two_installs_at_a_time_are_refused(service: Service, way: list[str]) -> None:
    other = ("flock", "/run/imageserver-install.lock")
    done = service.machine.try_run(*other, INSTALL, *way)

    assert (done.returncode, done.stdout, done.stderr) == (
        1,
        "",
        "install: another install or uninstall is under way.\n",
    )
    assert service.machine.path("/run/imageserver-install.lock").stat().st_mode & 0o777 == 0o600


def test_uninstalling_leaves_edited_settings_and_nothing_else(service: Service) -> None:
    machine = service.machine
    shutil.copytree(machine.path("/opt/imageserver"), machine.path("/root/opt"), symlinks=True)
    uid = machine.run("id", "-u", "imageserver").strip()
    machine.run("systemd-run", "--uid=imageserver", "--unit=other", "sleep", "100")
    done = machine.try_run(INSTALL, "--uninstall")
    edited = "install: /etc/imageserver was edited and stays.\n"
    stays = (
        "all but the user imageserver is removed; uninstall again when its processes have ended."
    )

    assert (done.returncode, done.stdout) == (1, edited)
    assert done.stderr.endswith(f"\ninstall: {stays}\n")
    assert machine.show(UNIT, "LoadState") == "not-found"
    assert machine.processes(UNIT) == []
    machine.run("systemctl", "stop", "other")
    assert machine.run(INSTALL, "--uninstall") == f"{edited}install: removed.\n"
    assert [path for path in WHERE if os.path.lexists(machine.path(path))] == ["/etc/imageserver"]
    assert os.listdir(machine.path("/etc/imageserver")) == ["imageserver.env"]
    assert machine.run("ps", "-e", "-o", "uid=").split().count(uid) == 0
    for names in ("/etc/passwd", "/etc/group"):
        assert "imageserver" not in machine.path(names).read_text()


def test_uninstalling_knows_settings_that_nobody_has_edited_without_a_current_release(
    machine: Machine,
) -> None:
    opt = machine.path("/opt/imageserver")
    shutil.move(machine.path("/root/opt"), opt)
    (sample,) = opt.glob("releases/9/conf/imageserver.env")
    with sample.open("a") as file:
        file.write("# not as in the source that uninstalls\n")
    shutil.copy(sample, machine.path("/etc/imageserver/imageserver.env"))
    (opt / "current").unlink()

    assert machine.run(INSTALL, "--uninstall") == "install: removed.\n"
    assert [path for path in WHERE if os.path.lexists(machine.path(path))] == []
