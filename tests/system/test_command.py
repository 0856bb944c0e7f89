# SPDX-License-Identifier: Apache-2.0
"""``imageserver serve``, installed as a user would, with no source tree in sight."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.harness import ROOT, Server, wait_until
from tests.system.service import WHEELS
from tests.system.test_start import assert_one_sentence, environment, run

PYTHON = "/usr/bin/python3"  # libnbd's module exists for the distribution's Python only


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command in a virtual environment that has seen nothing but ``pip install``."""
    place = tmp_path_factory.mktemp("installed")
    source, home = place / "source", place / "venv"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(
        ROOT / "imageserver", source / "imageserver", ignore=shutil.ignore_patterns("*.pyc")
    )
    subprocess.run([PYTHON, "-m", "venv", "--system-site-packages", home], check=True)
    pip = [home / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-index", "--find-links", WHEELS, source], check=True)
    shutil.rmtree(source)
    return home / "bin" / "imageserver"


@pytest.fixture
def server(command: Path, home: Path) -> Iterator[Server]:
    """A server whose settings are flags, started in the root directory."""
    server = Server(home, workers=1)
    flags = {
        name: server.env.pop(f"IMAGESERVER_{name.upper()}")
        for name in ("bind", "config_dir", "runtime_dir", "admin_bind")
    }
    words = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    server.command = ["env", "-C", "/", str(command), "serve", *words, "--max-readers=3"]
    with server:
        yield server


def features(server: Server) -> object:
    return server.request("OPTIONS", "/images/*").json["max_readers"]


def test_it_serves_from_anywhere_and_flags_survive_an_upgrade_and_a_reload(
    server: Server, home: Path
) -> None:
    (home / "image").write_bytes(b"bytes of an image")
    url = server.add("x", backend="file", file=str(home / "image"))
    assert server.request("GET", url).body == b"bytes of an image"
    assert features(server) == 3
    assert server.process is not None
    old = server.worker_pids()

    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: server.worker_pids() and not set(old) & set(server.worker_pids()), 20)
    workers = set(server.worker_pids())
    before = server.log.count(" accepts connections")
    server.process.send_signal(signal.SIGUSR2)
    (new,) = wait_until(lambda: set(server.worker_pids()) - workers)
    try:
        wait_until(lambda: server.log.count(" accepts connections") > before, 20)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0
        assert features(server) == 3
        assert server.request("GET", url).body == b"bytes of an image"
    finally:
        os.kill(new, signal.SIGTERM)
        wait_until(lambda: not Path(f"/proc/{new}").exists(), 20)


@pytest.mark.parametrize("flag", ["--workers=0", "--bind=nowhere", "--runtime-dir=/proc/no"])
def test_what_is_wrong_is_one_sentence(command: Path, home: Path, flag: str) -> None:
    settings = environment(runtime_dir=home / "run", config_dir=home / "none")
    done = run([str(command), "serve", flag], settings)

    assert_one_sentence(done, [])


def test_a_missing_libnbd_is_one_sentence(home: Path) -> None:
    (home / "nbd.py").write_text("raise ImportError('libnbd.so.0: cannot open shared object file')")
    settings = environment(runtime_dir=home / "run", config_dir=home / "none")
    serve = [sys.executable, "-m", "imageserver", "serve"]

    done = run(serve, settings | {"PYTHONPATH": str(home)})

    assert_one_sentence(done, ["libnbd", "install", "python3-libnbd"])
