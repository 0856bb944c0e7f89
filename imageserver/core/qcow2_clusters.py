# SPDX-License-Identifier: Apache-2.0
"""From extents to the clusters of a qcow2 file that are allocated, and in which way.

    extents    |  data  |     zero      |data|  zero  | dirty data | dirty zero      | clean |
    clusters   |     |     |     |     |     |     |     |     |     |     |     |     |     |
    full         D     D                 D     D           D     D
    overlay                                                D     D     D     Z     Z

*Full*: a cluster with any byte that may be other than zero has data (D), the others are not
allocated, and read as zeros. *Overlay*: a cluster with any dirty byte is allocated, as a zero
cluster (Z) where all of it reads as zeros; the others read as the backing file.

Pure; memory does not depend on the image.
"""

from collections.abc import Iterable, Iterator

from imageserver.core.extents import Extent

#: Neighbouring clusters of one state: the first, the one after the last, whether they have data.
#: A plain tuple: millions of them pass through.
Run = tuple[int, int, bool]


class Clusters:
    """Turns extents, over any number of calls to ``add``, into runs of clusters, in order."""

    def __init__(self, cluster_bits: int, *, overlay: bool) -> None:
        """``overlay``: the extents tell what is dirty."""
        self._bits, self._overlay = cluster_bits, overlay
        #: The cluster in which the extents so far end, and what is known of it.
        self._last, self._is_wanted, self._has_data = -1, False, False
        self._open: Run = (0, 0, False)

    def add(self, extents: Iterable[Extent]) -> list[Run]:
        """Return the runs that are complete; the last one stays open for the next call."""
        bits, overlay, join = self._bits, self._overlay, self._join
        runs: list[Run] = []
        at, is_wanted, has_data = self._last, self._is_wanted, self._has_data
        for start, length, zero, dirty in extents:
            wanted = dirty if overlay else not zero
            first, last = start >> bits, (start + length - 1) >> bits
            if first == at:
                is_wanted, has_data = is_wanted or wanted, has_data or not zero
            else:
                if is_wanted:
                    join(runs, at, at + 1, has_data)
                at, is_wanted, has_data = first, wanted, not zero
            if last > at:
                if is_wanted and wanted and has_data != zero:
                    join(runs, at, last, has_data)
                else:
                    if is_wanted:
                        join(runs, at, at + 1, has_data)
                    if wanted and last > at + 1:
                        join(runs, at + 1, last, not zero)
                at, is_wanted, has_data = last, wanted, not zero
        self._last, self._is_wanted, self._has_data = at, is_wanted, has_data
        return runs

    def finish(self) -> list[Run]:
        """Return the last runs."""
        runs: list[Run] = []
        if self._is_wanted:
            self._join(runs, self._last, self._last + 1, self._has_data)
        self._join(runs, -1, -1, False)  # noqa: FBT003 - a run that joins none
        return runs

    def _join(self, runs: list[Run], first: int, stop: int, has_data: bool) -> None:  # noqa: FBT001
        begun, end, state = self._open
        if first == end and has_data == state:
            self._open = begun, stop, state
            return
        if begun < end:
            runs.append(self._open)
        self._open = first, stop, has_data


def split(runs: Iterable[Run], shift: int) -> Iterator[Run]:
    """Cut runs at multiples of 1 << ``shift`` clusters."""
    for first, stop, has_data in runs:
        at = first
        while at >> shift != (stop - 1) >> shift:
            end = ((at >> shift) + 1) << shift
            yield at, end, has_data
            at = end
        yield at, stop, has_data
