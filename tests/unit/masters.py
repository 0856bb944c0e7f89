# SPDX-License-Identifier: Apache-2.0
"""A master that gunicorn has not set up, and what one finds when it starts."""

import os
import queue
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from gunicorn.config import Config

from imageserver.core.slots import Kind
from imageserver.observability import logs
from imageserver.process import Process
from imageserver.runtime.slottable import SharedTable
from imageserver.server import startup
from imageserver.server.arbiter import ImageArbiter
from imageserver.server.worker import ImageWorker

_HOLD = """
import sys
from imageserver.core.ports import Ticket
from imageserver.runtime.slottable import SharedTable
from imageserver.core.slots import Kind
SharedTable(sys.argv[1], {Kind.WRITE: 1}).claim(Kind.WRITE, Ticket("t", "write", "", ""))
"""


def settle(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Point the settings to directories in this one, which is returned; leave the log alone."""
    (place / "transfers").mkdir(0o755)
    (place / "transfers").chmod(0o755)
    for name in ("GUNICORN_FD", "LISTEN_FDS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("IMAGESERVER_CONFIG_DIR", str(place / "transfers"))
    monkeypatch.setenv("IMAGESERVER_RUNTIME_DIR", str(place / "run"))
    monkeypatch.setenv("IMAGESERVER_BIND", f"unix:{place}/socket")
    monkeypatch.setenv("IMAGESERVER_ADMIN_BIND", "none")
    monkeypatch.setattr(logs, "configure", lambda *_: None)
    monkeypatch.setattr(startup, "set_umask", lambda: None)
    return place


def new_arbiter() -> ImageArbiter:
    """Return a master; what a test lets gunicorn's own do, it patches in ``Arbiter``."""
    arbiter = ImageArbiter.__new__(ImageArbiter)
    vars(arbiter).update(
        cfg=Config(),
        pid=os.getpid(),
        WORKERS={},
        LISTENERS=[],
        app=SimpleNamespace(cfg=None),
        worker_class=ImageWorker,
        SIG_QUEUE=queue.SimpleQueue(),
        systemd=False,
        reexec_pid=0,
        master_pid=0,
    )
    return arbiter


def begin(arbiter: ImageArbiter) -> None:
    """Have it start with the settings of the environment."""
    arbiter.begin(startup.read_settings())


def prepared() -> Process:
    """Return a process whose runtime directory is made and open, with the same settings."""
    process = Process(startup.read_settings())
    process.runtime.prepare()
    process.slots.open()
    process.slots.close()
    return process


def writers(place: Path) -> int:
    """Return how many write slots are taken."""
    return SharedTable(str(place / "run"), {Kind.WRITE: 1}).count(Kind.WRITE)


def die_holding_a_slot(place: Path) -> None:
    subprocess.run([sys.executable, "-c", _HOLD, str(place / "run")], check=True, timeout=30)
