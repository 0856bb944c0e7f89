# SPDX-License-Identifier: Apache-2.0
"""Child processes, watched by their descriptors."""

import os
import signal


class Child:
    """A running child; ``fd`` is readable once it has ended (pidfd_open(2))."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.fd = os.pidfd_open(pid)
        self._status: int | None = None

    def has_ended(self) -> bool:
        """Tell whether it has ended; it is reaped then."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status is not None

    def send(self, number: signal.Signals) -> None:
        """Send it a signal; nothing happens if it has ended."""
        if not self.has_ended():
            os.kill(self.pid, number)

    @property
    def end(self) -> str:
        """How it has ended, in words."""
        if self._status is not None and self._status < 0:
            return f"was killed by {signal.Signals(-self._status).name}"
        return f"ended with status {self._status}"

    def close(self) -> None:
        """Close ``fd``; may be called twice."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
