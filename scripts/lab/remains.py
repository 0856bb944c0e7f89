# SPDX-License-Identifier: Apache-2.0
"""What a server must not hold, and its log not say, once all clients have gone."""

import contextlib
import fcntl

from lab.processes import LabFailed, wait_until
from lab.servers import Server

#: A refused upload lingers for 10 s at most.
_SETTLE_SECONDS = 10
_SIGNS_OF_BUGS = ("Traceback", "connection lost", "failed to boot", "damaged record")


def remains(server: Server) -> list[str]:
    """Return what is still held after a while, and the parts of the log that tell of a defect."""
    if server.is_dead():
        return [f"the server died:\n{server.log[-2000:]}"]
    with contextlib.suppress(LabFailed):
        wait_until(lambda: not server.holders(), _SETTLE_SECONDS)
    held = server.holders()
    found = [f"slots held at the end: {held}"] if held else []
    for path in (server.runtime / "locks").iterdir():
        with path.open("rb+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                found.append(f"image locked at the end: {path.name}")
    log = server.log
    places = [log.index(sign) for sign in _SIGNS_OF_BUGS if sign in log]
    return found + [f"the server's log: ...{log[max(0, at - 500) : at + 1500]}" for at in places]
