# SPDX-License-Identifier: Apache-2.0
"""How patient those are who only look: a busy server is asked again, one that is gone is not.

A transfer of hours survives a restart of its server; who looks wants to be told of it.
"""

from collections.abc import Callable
from typing import TypeVar

from imageserver.client.backoff import Patience, patiently
from imageserver.client.failures import Broken, Busy

T = TypeVar("T")


def answered(action: Callable[[], T], patience_seconds: float) -> T:
    """Do it, again while the server is busy.

    Raises:
        Unreachable: there is no server.
        Transient: patience has ended.
    """
    return patiently(action, Patience(patience_seconds), (Busy, Broken))
