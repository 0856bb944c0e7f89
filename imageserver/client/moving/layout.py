# SPDX-License-Identifier: Apache-2.0
"""The layout of an image on a server: its size, and where its data is. Both must agree."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from imageserver.client.backoff import RetryBudget, retried
from imageserver.client.failures import Failed, Refused
from imageserver.client.http.answers import Abilities
from imageserver.client.http.remote import Remote
from imageserver.client.plan import Spans, data_spans, joined
from imageserver.core.extents import Extent


@dataclass(frozen=True, slots=True)
class Layout:
    """Size, data and zeros of an image; without ``is_mapped``, all of it counts as data."""

    size: int
    data: Spans
    zeros: Spans
    is_mapped: bool

    @property
    def changed(self) -> Spans:
        """All spans that an incremental download writes."""
        return Spans(joined([*self.data, *self.zeros]))


def _up_to(size: int, extents: Iterable[Extent]) -> Iterator[Extent]:
    """Yield extents as far as the first that ends beyond the image: more may come without end."""
    for extent in extents:
        yield extent
        if extent[0] + extent[1] > size:
            return


def ask_layout(remote: Remote, abilities: Abilities, budget: RetryBudget, *, dirty: bool) -> Layout:
    """Ask for the image's size and extents; ``dirty``: only those that have changed.

    Raises:
        Refused: the server cannot tell what has changed.
        Failed: size and extents disagree, twice.
    """
    size = retried(remote.size, budget)
    if not size:  # ``Remote.extents`` must not be asked for
        return Layout(0, Spans(), Spans(), is_mapped=True)
    if not abilities.has("extents"):
        if dirty:
            raise Refused("the server does not tell what has changed: no incremental download")
        return Layout(size, Spans([(0, size)]), Spans(), is_mapped=False)

    def spans() -> tuple[Spans, Spans, int]:
        extents = remote.extents("dirty" if dirty else "zero")
        return data_spans(_up_to(size, extents), dirty=dirty)

    data, zeros, end = retried(spans, budget)
    if end != size:  # it may have grown between the two questions
        size = retried(remote.size, budget)
        data, zeros, end = retried(spans, budget)
    if end != size:
        raise Failed(
            f"the extents end at {end}, the image at {size}: "
            "it is being changed, or the server is wrong"
        )
    if not dirty:
        # One extent of data is what a server says of an image whose holes it does not know, too.
        return Layout(size, data, Spans(), is_mapped=data.total < size)
    return Layout(size, data, zeros, is_mapped=True)
