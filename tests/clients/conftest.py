# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests with other projects' clients."""

from tests.system.conftest import disk, home, raw_nbd, server, workplace  # noqa: F401 - fixtures
