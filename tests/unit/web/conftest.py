# SPDX-License-Identifier: Apache-2.0
"""The application over a fake world, and a client of it."""

import pytest
from falcon import testing

from tests.unit.fakes import World
from tests.unit.webapp import app_over


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def client(world: World) -> testing.TestClient:
    return testing.TestClient(app_over(world), headers={"X-Request-Id": "r1"})
