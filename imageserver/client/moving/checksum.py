# SPDX-License-Identifier: Apache-2.0
"""The checksum of one image: computed by its server, or here, from all of its data.

A server that has no checksums, or not this one, has its image read: the same bytes, the same hex.
"""

import contextlib
import time
from dataclasses import dataclass

from imageserver.client.backoff import RetryBudget, retried, retried_while_busy
from imageserver.client.failures import Refused
from imageserver.client.http.remote import Remote
from imageserver.client.moving.blocks import Part, RemoteParts, add, cores, local_part, parts
from imageserver.client.moving.layout import ask_layout
from imageserver.client.moving.source import open_source
from imageserver.client.moving.verify import same_length
from imageserver.client.plan import Spans
from imageserver.client.showing.progress import Watcher
from imageserver.core.checksums import Recipe

#: Statuses of a server that does not know the route or the algorithm.
_UNKNOWN = {400, 404, 405, 501}


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which checksum, and how an image is read for it; ``block_size`` in bytes, None: default."""

    algorithm: str
    block_size: int | None = None
    format: str | None = None
    backing: bool = False
    force: bool = False
    connections: int | None = None
    patience_seconds: float = 60.0

    def recipe(self) -> Recipe:
        """Return what computes it.

        Raises:
            BadRequest: there is no such checksum.
        """
        return Recipe(self.algorithm, self.block_size)


@dataclass(frozen=True, slots=True)
class Result:
    """A checksum; ``computed``: by the "server", or "here"."""

    algorithm: str
    block_size: int | None
    checksum: str
    computed: str
    seconds: float


@dataclass(frozen=True, slots=True)
class _Source:
    """Where data is, what reads and hashes it, and how many threads do so at once."""

    data: Spans
    size: int
    part: Part
    threads: int


def checksum_of_file(path: str, wanted: Wanted, watch: Watcher) -> Result:
    """Compute the checksum of a local image.

    Raises:
        ClientError: it cannot be read, or is changed meanwhile.
    """
    began, threads = time.monotonic(), cores()
    local = open_source(path, wanted.format, threads, backing=wanted.backing, force=wanted.force)
    with contextlib.closing(local):
        recipe = wanted.recipe()
        source = _Source(local.spans(), local.size, local_part(local.read, recipe), threads)
        _add_all(recipe, source, watch)
        local.require_unchanged()
    return _result(recipe, "here", began)


def checksum_of_image(remote: Remote, wanted: Wanted, watch: Watcher) -> Result:
    """Return the checksum of an image on a server.

    Raises:
        ClientError: there is none.
    """
    began, recipe = time.monotonic(), wanted.recipe()
    size = None if recipe.is_whole else recipe.block_size
    budget = RetryBudget(wanted.patience_seconds)
    abilities = retried_while_busy(remote.abilities, wanted.patience_seconds)
    why = "the server computes no checksums"
    if abilities.has("checksum"):
        try:
            told = retried(lambda: remote.checksum(wanted.algorithm, size), budget)
        except Refused as exc:
            if exc.code not in _UNKNOWN:
                raise
            why = str(exc)
        else:
            return Result(wanted.algorithm, size, told, "server", time.monotonic() - began)
    watch.note(f"All data is read: {why}.")
    layout = ask_layout(remote, abilities, budget, dirty=False)
    many = remote.connections(wanted.connections, abilities.max_readers)
    reader = RemoteParts(remote, recipe, budget)
    try:
        _add_all(recipe, _Source(layout.data, layout.size, reader.part, many), watch)
    except BaseException:
        reader.end()
        raise
    same_length(layout.size, retried(remote.size, budget))
    return _result(recipe, "here", began)


def _add_all(recipe: Recipe, source: _Source, watch: Watcher) -> None:
    total = source.data.total
    watch.begin("checksum", total)
    done, span = 0, (0, source.size)
    with contextlib.closing(parts(recipe, source.data, span, source.part, source.threads)) as found:
        for each in found:
            add(recipe, each)
            done += sum(stop - start for start, stop in each[0].data)
            watch.moved(min(done, total))


def _result(recipe: Recipe, computed: str, began: float) -> Result:
    fields = recipe.answer()
    size = None if recipe.is_whole else recipe.block_size
    seconds = time.monotonic() - began
    return Result(recipe.algorithm, size, str(fields["checksum"]), computed, seconds)
