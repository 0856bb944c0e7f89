# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests in which something dies."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.world import Nbd
from tests.system.conftest import home, workplace  # noqa: F401 - fixtures
from tests.system.disks import sparse

SIZE = 64 << 20


@pytest.fixture(scope="module")
def nbd(workplace: Path) -> Iterator[Nbd]:  # noqa: F811 - the fixture
    """An NBD server that may be killed, stopped and started again."""
    with Nbd(sparse(workplace / "disk", SIZE)) as running:
        yield running
