# SPDX-License-Identifier: Apache-2.0
"""Where an image's data is, as its server says; its extents and its size must agree."""

from collections.abc import Iterator
from dataclasses import dataclass

from imageserver.client.backoff import RetryBudget, retried
from imageserver.client.failures import Failed, Refused
from imageserver.client.http.answers import Abilities
from imageserver.client.http.remote import Remote
from imageserver.client.plan import Spans, data_spans, joined
from imageserver.core.extents import Extent


@dataclass(frozen=True, slots=True)
class Image:
    """What the server says of the image; ``is_mapped``: where its data is."""

    size: int
    data: Spans
    zeros: Spans
    is_mapped: bool

    @property
    def changed(self) -> Spans:
        """All that an incremental download writes."""
        return Spans(joined([*self.data, *self.zeros]))


def survey(remote: Remote, abilities: Abilities, budget: RetryBudget, *, dirty: bool) -> Image:
    """Ask for the image's size and extents; ``dirty``: only what has changed.

    Raises:
        Refused: the server cannot tell what has changed.
        Failed: size and extents disagree, twice.
    """
    size = retried(remote.size, budget)
    if not size:  # oVirt's daemon has no good answer about its extents
        return Image(0, Spans(), Spans(), is_mapped=True)
    if not abilities.has("extents"):
        if dirty:
            raise Refused("the server does not tell what has changed: no incremental download")
        return Image(size, Spans([(0, size)]), Spans(), is_mapped=False)
    data, zeros, end = retried(lambda: _extents(remote, dirty=dirty), budget)
    if end != size:  # it may have grown between the two questions
        size = retried(remote.size, budget)
        data, zeros, end = retried(lambda: _extents(remote, dirty=dirty), budget)
    if end != size:
        raise Failed(
            f"the extents end at {end}, the image at {size}: "
            "it is being changed, or the server is wrong"
        )
    if not dirty:
        # One extent of data may also be said of an image that the server cannot look into.
        return Image(size, data, Spans(), is_mapped=data.total < size)
    return Image(size, data, zeros, is_mapped=True)


def _extents(remote: Remote, *, dirty: bool) -> tuple[Spans, Spans, int]:
    """Return where data and zeros are, and where the image ends by that."""
    end = 0

    def told() -> Iterator[Extent]:
        nonlocal end
        for extent in remote.extents("dirty" if dirty else "zero"):
            end = extent[0] + extent[1]
            yield extent

    data, zeros = data_spans(told(), dirty=dirty)
    return data, zeros, end
