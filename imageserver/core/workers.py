# SPDX-License-Identifier: Apache-2.0
"""What a worker's record in the slot table says: done = connections in work, expected = state."""

from enum import Enum

from imageserver.core.slots import Holder


class WorkerState(Enum):
    """What a worker does; its record begins as BOOTING."""

    BOOTING = 0
    ACCEPTING = 1
    DRAINING = 2
    UNKNOWN = -1

    @classmethod
    def of(cls, row: Holder) -> "WorkerState":
        """Return the state of the worker that holds a record."""
        return _WORKER_STATES.get(row.expected, cls.UNKNOWN)


_WORKER_STATES = {state.value: state for state in WorkerState}
