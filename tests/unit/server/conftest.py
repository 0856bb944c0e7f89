# SPDX-License-Identifier: Apache-2.0
"""What several modules need: a connection with its client, and gunicorn's configuration."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from gunicorn import config

from imageserver.server.arbiter import ImageArbiter
from imageserver.server.configuration import ImageApplication
from imageserver.settings import Settings
from tests.unit.exchanges import Line
from tests.unit.masters import new_arbiter, settle


@pytest.fixture
def line() -> Iterator[Line]:
    """Yield an accepted connection."""
    ours, theirs = socket.socketpair()
    ours.settimeout(0)
    theirs.settimeout(5)
    with ours, theirs:
        yield Line(ours, theirs)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return where a server's directories are, as its variables say."""
    return settle(tmp_path, monkeypatch)


@pytest.fixture
def arbiter() -> ImageArbiter:
    """Return a master that has bound and forked nothing."""
    return new_arbiter()


@pytest.fixture
def configured(tmp_path: Path) -> config.Config:
    """Return gunicorn's configuration as this server makes it; a wrong name is an error."""
    return ImageApplication(Settings(runtime_dir=str(tmp_path))).cfg
