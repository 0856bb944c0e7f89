# SPDX-License-Identifier: Apache-2.0
"""What tests with oVirt's client need: it leaves one of its NBD connections to the collector."""

import gc
from collections.abc import Iterator

import pytest

#: ``pytestmark`` of a module that uses the client.
LEAVES_A_CONNECTION = [
    pytest.mark.filterwarnings(
        "ignore:.*socket.*/imageio-:pytest.PytestUnraisableExceptionWarning"
    ),
    pytest.mark.filterwarnings("ignore:.*socket.*/imageio-:ResourceWarning"),
]


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """Have what a test has left closed with it."""
    yield
    gc.collect()
