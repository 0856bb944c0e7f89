# SPDX-License-Identifier: Apache-2.0
"""What no unit test leaves behind for the next one in its process."""

import pytest

from imageserver.transfers.tracking import Tracker


@pytest.fixture(autouse=True)
def _no_tracker_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the thread of a tracker end at once; tests call ``beat`` themselves.

    It would go on for as long as the process: others replace ``time.sleep``, which it calls.
    """
    monkeypatch.setattr(Tracker, "_beat", lambda _: None)
