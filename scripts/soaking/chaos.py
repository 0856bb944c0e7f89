# SPDX-License-Identifier: Apache-2.0
"""What dies, and when; and what that excuses.

A client's failure counts unless the storm caused it: a connection may be cut if a worker was
killed since its last answer, a 500, 504 or cut is excused by an outage of that image's NBD
server. A reload excuses nothing.
"""

import collections
import contextlib
import math
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from functools import partial

from lab.servers import Server, holding, slots

from imageserver.runtime.processes import owner_of
from soaking.backends import NbdImage

#: How far the effect of an event and its time stamp may be apart, in seconds.
_GRACE = 1.0
#: Events shown when something went wrong.
_TRACE = 2000
Act = Callable[[], None]


class Trace:
    """What happened, the last part of it, and what it excuses."""

    def __init__(self) -> None:
        self._lines: collections.deque[str] = collections.deque(maxlen=_TRACE)
        self._kills: list[float] = []
        self._outages: list[tuple[str, float, float]] = []
        self.failures: list[str] = []
        self.counts: collections.Counter[str] = collections.Counter()

    def note(self, text: str) -> None:
        """Add a line."""
        self._lines.append(f"{time.monotonic():.3f} {text}")

    def fail(self, text: str) -> None:
        """Add a line that makes the soak fail."""
        self.note(f"FAILED {text}")
        self.failures.append(text)

    def killed(self) -> None:
        """Note that a worker was killed just now."""
        self._kills.append(time.monotonic())

    def outage(self, image: str) -> Act:
        """Note that an NBD server fails from now on; return what says that it is back."""
        self._outages.append((image, time.monotonic(), math.inf))
        place = len(self._outages) - 1

        def is_back() -> None:
            self._outages[place] = (*self._outages[place][:2], time.monotonic())

        return is_back

    def is_killed_since(self, since: float) -> bool:
        """Tell whether a worker was killed after ``since``."""
        return any(at > since - _GRACE for at in self._kills[-50:])

    def is_out_since(self, image: str, since: float) -> bool:
        """Tell whether an image's NBD server was down after ``since``."""
        return any(name == image and end > since - _GRACE for name, _, end in self._outages[-50:])

    def expect(self, *names: str) -> None:
        """Fail for each of these that has never been counted: it was not tested."""
        for name in names:
            if not self.counts[name]:
                self.fail(f"nothing was tested: {name} never happened")

    def text(self) -> str:
        """Return the last lines."""
        return "\n".join(self._lines)


class Chaos(threading.Thread):
    """Kills, reloads and stops things at seeded intervals."""

    def __init__(
        self, server: Server, images: list[NbdImage], trace: Trace, seed: str, pace: float
    ) -> None:
        """``pace``: mean seconds between two events."""
        super().__init__(name="chaos")
        self._server = server
        self._images = images
        self._trace = trace
        self._choose = random.Random(seed)
        self._pace = pace
        self._table = slots(server.runtime)
        self._ended = threading.Event()
        self._outages: list[threading.Thread] = []

    def stop(self) -> None:
        """End, with every NBD server back."""
        self._ended.set()
        self.join()
        for outage in self._outages:
            outage.join()

    def run(self) -> None:
        """Let things die until told to stop."""
        events = [self._kill] * 7 + [self._reload] * 2 + [self._stop_nbd] * 2 + [self._kill_nbd]
        try:
            while not self._ended.wait(self._choose.uniform(0, 2 * self._pace)):
                self._choose.choice(events)()
        except Exception as exc:  # noqa: BLE001 - whatever it is, the soak has failed
            self._trace.fail(f"chaos: {exc!r}")

    def _holders(self) -> list[tuple[int, str]]:
        held = holding(self._table)
        return [(h.owner.pid, f"{h.operation} {h.transfer}") for h in held if owner_of(h.owner.pid)]

    def _kill(self) -> None:
        """SIGKILL a worker that holds something; stopped first, so that it still does."""
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline:
            holders = self._holders()
            writers = [held for held in holders if not held[1].startswith("read")]
            # Writers matter most and are the shortest: every other time, one of them.
            pool = writers if writers and self._choose.random() < 0.5 else holders  # noqa: PLR2004
            if pool and self._kill_if_holding(*self._choose.choice(pool)):
                return
            time.sleep(0.005)

    def _kill_if_holding(self, pid: int, what: str) -> bool:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            try:
                held = [text for holder, text in self._holders() if holder == pid]
                if what in held:
                    self._trace.killed()
                    os.kill(pid, signal.SIGKILL)
                    self._trace.note(f"killed worker {pid} that held {held}")
                    self._trace.counts["workers killed that held"] += 1
                    self._trace.counts["... a lock"] += any("read" not in text for text in held)
                    return True
            finally:
                os.kill(pid, signal.SIGCONT)
        return False

    def _reload(self) -> None:
        self._trace.note("reload")
        self._server.signal(signal.SIGHUP)
        self._trace.counts["reloads"] += 1

    def _stop_nbd(self) -> None:
        seconds, image = self._choose.uniform(0.2, 5.0), self._choose.choice(self._images)
        down, up = (partial(image.server.signal, n) for n in (signal.SIGSTOP, signal.SIGCONT))
        self._begin("stopped", image, seconds, down, up)

    def _kill_nbd(self) -> None:
        seconds, image = self._choose.uniform(0.0, 2.0), self._choose.choice(self._images)
        self._begin("killed", image, seconds, image.stop, image.start)

    def _begin(self, what: str, image: NbdImage, seconds: float, down: Act, up: Act) -> None:
        def outage() -> None:
            with image.lock:
                is_back = self._trace.outage(image.name)
                self._trace.note(f"{image.name}: {what} for {seconds:.1f} s")
                down()
                self._ended.wait(seconds)
                up()
                is_back()
            self._trace.counts[f"NBD servers {what}"] += 1

        self._outages = [thread for thread in self._outages if thread.is_alive()]
        if len(self._outages) < len(self._images) - 1:  # one of them always works
            thread = threading.Thread(target=outage)
            thread.start()
            self._outages.append(thread)
