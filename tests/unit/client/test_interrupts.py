# SPDX-License-Identifier: Apache-2.0
"""A signal ends a wait that it does not interrupt."""

import os
import select
import signal
import threading
import time

import pytest

from imageserver.client.interrupts import seen_while_waiting


def test_an_interruption_that_no_system_call_has_seen_ends_the_wait_all_the_same() -> None:
    # It comes in another thread: like one just before the call, it interrupts nothing.
    elsewhere = threading.Timer(0.1, lambda: signal.pthread_kill(threading.get_ident(), 2))
    reading, writing = os.pipe()
    began = time.monotonic()
    elsewhere.start()
    with pytest.raises(KeyboardInterrupt), seen_while_waiting():
        select.select([reading], [], [], 10)
    elsewhere.join()
    assert time.monotonic() - began < 5
    for fd in (reading, writing):
        os.close(fd)


def test_what_the_alarm_was_for_is_as_before() -> None:
    handler, (_, interval) = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)
    with seen_while_waiting():
        assert signal.getitimer(signal.ITIMER_REAL)[1] == pytest.approx(1)
    assert signal.getsignal(signal.SIGALRM) is handler
    assert signal.getitimer(signal.ITIMER_REAL)[1] == interval
