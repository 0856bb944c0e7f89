# SPDX-License-Identifier: Apache-2.0
"""Where a server may keep its files: checked beforehand, without a change to anything."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.system.harness import GUNICORN, ROOT, Server, program, wait_until
from tests.system.skips import needs
from tests.system.test_start import CHECK, SERVE, assert_one_sentence, environment, run

COMMANDS = pytest.mark.parametrize("command", [CHECK, SERVE], ids=["check", "serve"])


def _directory(path: Path, mode: int, *files: str) -> Path:
    path.mkdir()
    path.chmod(mode)
    for name in files:
        (path / name).touch()
    return path


#: What is wrong, and what the sentence must name.
WRONG = {
    "open to others": (
        lambda home: {"runtime_dir": _directory(home / "d", 0o1777)},
        ["IMAGESERVER_RUNTIME_DIR", "has mode 1777, not 0700", "choose a directory"],
    ),
    "with files of others": (
        lambda home: {"runtime_dir": _directory(home / "d", 0o700, "thesis.tex")},
        ["IMAGESERVER_RUNTIME_DIR", "thesis.tex", "choose a directory that is empty"],
    ),
    "socket's name too long in bytes": (
        lambda home: {"bind": f"unix:{home}/{'é' * ((110 - len(str(home))) // 2)}"},
        ["IMAGESERVER_BIND", "at most 107 bytes"],
    ),
    "socket in no directory": (
        lambda home: {"bind": f"unix:{home}/missing/socket"},
        ["IMAGESERVER_BIND", f"{os.sep}missing is no directory where this user can make a socket"],
    ),
    "label too long": (
        lambda _: {"bind": f"{'a' * 64}.example:54999"},
        ["IMAGESERVER_BIND", "no name of a host"],
    ),
}


@COMMANDS
@pytest.mark.parametrize("name", WRONG)
def test_a_place_that_cannot_be_used_is_refused_and_left_as_it_is(home, name, command):
    make, words = WRONG[name]
    (home / "config").mkdir(0o700)
    settings = {"runtime_dir": home / "run", "config_dir": home / "config"} | make(home)
    before = state_of(home)
    assert_one_sentence(run(command, environment(**settings)), words)
    assert state_of(home) == before


def state_of(directory: Path) -> list[tuple[str, int, int]]:
    """Return everything in a directory with its mode and time of change."""
    found = [directory, *directory.rglob("*")]
    return sorted((str(path), path.stat().st_mode, path.stat().st_ctime_ns) for path in found)


def test_a_check_changes_nothing(home):
    settings = environment(
        runtime_dir=home / "run",
        config_dir=_directory(home / "config", 0o700),
        bind=f"unix:{home}/images",
        control_socket=home / "control",
    )
    before = state_of(home)
    assert run(CHECK, settings).stdout == "ok\n"
    assert state_of(home) == before


def test_a_check_beside_a_running_server_changes_nothing(home):
    with Server(home, workers=1) as server:
        before = state_of(server.runtime / "locks")
        assert run(CHECK, server.env).stdout == "ok\n"
        assert state_of(server.runtime / "locks") == before
        assert server.request("OPTIONS", "/images/*").status == 200


@pytest.mark.parametrize("umask", [0o277, 0o777], ids=oct)
def test_no_umask_keeps_a_server_from_its_files(home, umask):
    server = Server(home, workers=1)
    server.command = ["sh", "-c", f"umask {umask:o} && exec {GUNICORN}"]
    with server:
        url = server.add("new", backend="file", file=str(home / "image"))
        assert server.request("PUT", url, b"image").status == 200
        assert (home / "image").stat().st_mode & 0o7777 == 0o600
        assert server.request("GET", url).body == b"image"


@needs("mounts")
@COMMANDS
def test_a_full_file_system_is_told_in_one_sentence(home, command):
    (home / "small").mkdir()
    mount = f"mount -t tmpfs -o size=256k,mode=0700 tmpfs {home}/small && exec {' '.join(command)}"
    settings = environment(runtime_dir=home / "small" / "run", config_dir=home / "none")
    done = run([program("unshare"), "--mount", "sh", "-c", mount], settings)
    assert_one_sentence(done, ["IMAGESERVER_RUNTIME_DIR", os.strerror(errno.ENOSPC)])


@needs("mounts")
def test_a_shared_memory_file_system_that_takes_no_files_is_done_without(home):
    server = Server(home, workers=1)
    mount = f"mount -t tmpfs -o ro tmpfs /dev/shm && exec {GUNICORN}"
    server.command = [program("unshare"), "--mount", "sh", "-c", mount]
    with server:
        assert server.request("OPTIONS", "/images/*").status == 200


@needs("mounts")
def test_the_same_path_in_another_mount_namespace_is_another_place(home):
    place = _directory(home / "place", 0o700)
    with Server(home, workers=1, runtime_dir=place / "run") as server:
        mount = f"mount -t tmpfs -o mode=0700 tmpfs {place} && exec {' '.join(CHECK)}"
        settings = server.env | {"IMAGESERVER_BIND": f"unix:{home}/other"}
        done = run([program("unshare"), "--mount", "sh", "-c", mount], settings)
        assert (done.stdout, done.stderr) == ("ok\n", "")


@needs("PID namespaces")
@COMMANDS
def test_a_server_in_another_pid_namespace_is_refused(home, command):
    with Server(home, workers=1) as server:
        other = [program("unshare"), "--pid", "--fork", "--mount-proc", *command]
        done = run(other, server.env | {"IMAGESERVER_BIND": f"unix:{home}/other"})
        assert_one_sentence(done, ["IMAGESERVER_RUNTIME_DIR", "another PID namespace"])
        assert server.request("OPTIONS", "/images/*").status == 200


@needs("PID namespaces")
@COMMANDS
def test_a_proc_of_another_pid_namespace_is_refused(home, command):
    settings = environment(runtime_dir=home / "run", config_dir=home / "none")
    done = run([program("unshare"), "--pid", "--fork", *command], settings)
    assert_one_sentence(done, ["/proc is missing, or that of another PID namespace"])


@needs("PID namespaces")
def test_a_table_left_by_a_dead_pid_namespace_is_made_anew(home):
    _directory(home / "run", 0o700)
    code = (
        "import sys\n"
        "from imageserver.core.ports import Ticket\n"
        "from imageserver.core.slots import Kind\n"
        "from imageserver.runtime.slottable import SharedTable\n"
        "SharedTable(sys.argv[1], {}).claim(Kind.WRITE, Ticket('t', 'write', '', ''))\n"
    )
    left = [sys.executable, "-c", code, str(home / "run")]
    namespace = [program("unshare"), "--pid", "--fork", "--mount-proc"]
    subprocess.run([*namespace, *left], cwd=ROOT, check=True)
    with Server(home, workers=1) as server:
        wait_until(lambda: server.holders() == [])
