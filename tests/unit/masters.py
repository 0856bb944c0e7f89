# SPDX-License-Identifier: Apache-2.0
"""As much of a gunicorn master as the hooks know, and what one finds when it starts."""

import queue
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from gunicorn.config import Config

from imageserver.core.slots import Kind
from imageserver.runtime.slottable import SharedTable
from imageserver.server import hooks
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
    monkeypatch.setattr(hooks.logs, "configure", lambda *_: None)
    monkeypatch.setattr(hooks, "close_to_others", lambda: None)
    return place


def new_arbiter() -> SimpleNamespace:
    return SimpleNamespace(
        cfg=Config(),
        reload=lambda: None,
        stop=lambda _graceful: None,
        kill_worker=lambda _pid, _number: None,
        WORKERS={},
        spawn_worker=lambda: None,
        reexec=lambda: None,
        reap_workers=lambda: None,
        app=SimpleNamespace(cfg=None),
        worker_class=ImageWorker,
        SIG_QUEUE=queue.SimpleQueue(),
        systemd=False,
        tls=None,
    )


def writers(place: Path) -> int:
    """Return how many write slots are taken."""
    return SharedTable(str(place / "run"), {Kind.WRITE: 1}).count(Kind.WRITE)


def die_holding_a_slot(place: Path) -> None:
    subprocess.run([sys.executable, "-c", _HOLD, str(place / "run")], check=True, timeout=30)
