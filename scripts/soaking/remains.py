# SPDX-License-Identifier: Apache-2.0
"""What a server must not hold, and its log not say, once all clients have gone."""

import fcntl
import time

from tests.system.harness import Server

#: A refused upload lingers for 10 s at most.
_SETTLE_SECONDS = 10
_SIGNS_OF_BUGS = ("Traceback", "connection lost", "failed to boot", "damaged record")


def held(server: Server) -> list[str]:
    """Return what is still held after a while."""
    deadline = time.monotonic() + _SETTLE_SECONDS
    while (slots := server.holders()) and time.monotonic() < deadline:
        time.sleep(0.1)
    found = [f"slots held at the end: {slots}"] if slots else []
    for path in (server.runtime / "locks").iterdir():
        with path.open("rb+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                found.append(f"image locked at the end: {path.name}")
    return found


def signs_of_bugs(log: str) -> list[str]:
    """Return the parts of a server's log that tell of a defect."""
    places = [log.index(sign) for sign in _SIGNS_OF_BUGS if sign in log]
    return [f"the server's log: ...{log[max(0, at - 500) : at + 1500]}" for at in places]
