# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests against a real server."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.harness import Server


@pytest.fixture(scope="module")
def workplace() -> Iterator[Path]:
    """A private directory with a short path: Unix sockets have 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="is-") as name:
        os.chmod(name, 0o700)
        yield Path(name)


@pytest.fixture(scope="module")
def server(workplace: Path) -> Iterator[Server]:
    """A server with three workers, shared by the tests of a module."""
    with Server(workplace) as running:
        yield running
