# SPDX-License-Identifier: Apache-2.0
"""What holds for all tests, however they were started."""

import os
import signal

from hypothesis import settings

from tests.system.harness import with_sbin

# A busy machine takes as long as it likes over one example; a test that hangs has a timeout.
settings.register_profile("any_machine", deadline=None)
settings.load_profile("any_machine")


def pytest_configure() -> None:
    # A shell lets what it starts in the background ignore SIGINT, and so would every program
    # that a test starts: those that end by Ctrl-C would not.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["PATH"] = with_sbin(os.environ.get("PATH", os.defpath))
