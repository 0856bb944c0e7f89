# SPDX-License-Identifier: Apache-2.0
"""The file that a download fills: what an earlier run has left in it, and how it ends.

    FILE.part          what has come so far, a hole where nothing was written
    FILE.part.state    which ranges of it are on stable storage (``resume``)
    FILE               all of it: the part, renamed

With ``incremental`` into an image that exists, FILE itself is written. Then a state beside it,
FILE.incremental.state, means that it is half old, half new: only what completes it removes that.
It lies beside the file that links lead to, so that whatever name FILE is called by tells.

What was left is gone on with if the state is of this image, the file as long as it was, and
samples of it agree with the server. If one of them does not, that is said, and all begins anew.
"""

import contextlib
import os
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import replace

from imageserver.client.failures import Different, LocalFailure
from imageserver.client.local.files import local_errors, rename_new, sync_folder
from imageserver.client.local.formats import SECTOR, LocalImage, create_image, open_image
from imageserver.client.moving import resume
from imageserver.client.moving.file_locks import Claim, claimed, unchanged
from imageserver.client.moving.layout import Image
from imageserver.client.moving.wanted import (
    Wanted,
    half_state,
    is_half,
    require_one_name,
    require_replaceable,
    state_beside,
)
from imageserver.client.plan import Range, Spans

#: The kind, in a state, of a part that was found to be wrong: no download goes on with it.
_WRONG = "different"


class Target:
    """The file, for what the server at ``url`` said of the image."""

    def __init__(self, wanted: Wanted, image: Image, url: str) -> None:
        self._wanted, self._image = wanted, image
        self._url_path = urllib.parse.urlsplit(url).path
        self._kind = wanted.kind()
        self._identity = self._identity_of(image)
        #: What is written: the part, or FILE itself.
        self.path = wanted.file if wanted.in_place else wanted.part
        # Where a link is replaced, what it has led to stays as it is, and so does its state.
        beside = half_state(wanted.file) if wanted.in_place else state_beside(wanted.file)
        self._half = resume.State(beside)
        self._state = self._half if wanted.in_place else resume.State(f"{wanted.part}.state")
        self._claim: Claim | None = None
        self._is_base_same: Callable[[], bool] = lambda: True

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep other downloads of FILE out, and those that would write the base."""
        with contextlib.ExitStack() as held:
            ours = claimed(self.path, is_part=not self._wanted.in_place)
            self._claim = held.enter_context(ours)
            if self._wanted.in_place:  # again: it may have got another since
                require_one_name(self.path)
            if self._wanted.base:
                self._is_base_same = held.enter_context(unchanged(self._wanted.base))
            yield

    def open(
        self,
        connections: int,
        compare: Callable[[LocalImage, Spans], None],
        note: Callable[[str], None],
    ) -> tuple[list[Range], LocalImage]:
        """Open what an earlier run has left, or begin anew; return what is done of it.

        ``compare`` raises ``Different`` where the server has something else, ``note`` is told
        why all begins anew.
        """
        saved = self._state.load()
        if self._wanted.in_place:
            resume.require_whole(self._half, self._wanted.file, self._image.changed)
        if self._state.exists() and not self._wanted.restart:
            try:
                done = self._fitting(saved)
                return done, self._reopened(done, connections, compare)
            except _Unfit as exc:
                note(f"{exc}: starting again.")
        if self._wanted.in_place:  # the state stays until it says what begins now
            return [], self._open_base(connections)
        if self._state.exists():
            self.distrust()
        return [], self._create(connections)

    def _fitting(self, saved: resume.Saved | None) -> list[Range]:
        """Return what is done, if it is of this image."""
        if saved is None:
            raise _Unfit(f"{self._state.path} cannot be read")
        if saved.image.kind == _WRONG:
            raise _Unfit(f"{self.path} is not to be trusted")
        if saved.image.path != self._identity.path:
            raise _Unfit("The URL is not the one that was being downloaded")
        if saved.image != self._identity:
            raise _Unfit("The image is not the one that was being downloaded")
        return saved.done

    def _reopened(
        self, done: list[Range], connections: int, compare: Callable[[LocalImage, Spans], None]
    ) -> LocalImage:
        """Open what an earlier run has left, if it is what that left and the server has."""
        with contextlib.ExitStack() as closing:
            local = closing.enter_context(contextlib.closing(self._as_left(connections)))
            data = self._image.data
            try:
                compare(local, data.without(data.without(done)))
            except Different as exc:
                raise _Unfit(f"{self.path} is not what the server has now") from exc
            if not self._image.is_mapped:  # zeros will not be written: let there be none
                for start, stop in Spans(done).gaps(self._image.size):
                    local.zero(start, stop)
            closing.pop_all()
            return local

    def _as_left(self, connections: int) -> LocalImage:
        unlike = _Unfit(f"{self.path} is not as it was left")
        if not os.path.getsize(self.path):
            raise unlike
        try:
            local = self._open_part(connections)
        except LocalFailure as exc:
            raise unlike from exc
        if local.size != self._local_size():
            local.close()
            raise unlike
        return local

    def _local_size(self) -> int:
        """Return how long the image is here: qcow2 has whole sectors only."""
        block = 1 if self._wanted.format == "raw" else SECTOR
        return -(-self._image.size // block) * block

    def _require_ours(self) -> None:
        if self._claim:
            self._claim.require()

    def _ours(self) -> os.stat_result | None:
        return self._claim.file if self._claim else None

    def _open_part(self, connections: int) -> LocalImage:
        kind, ours = self._wanted.format, self._ours()
        return open_image(self.path, kind, connections, writable=True, ours=ours)

    def _open_base(self, connections: int) -> LocalImage:
        local = self._open_part(connections)
        if local.size != self._local_size():
            local.close()
            raise LocalFailure(
                f"{self.path} has {local.size} bytes, the image {self._image.size}: "
                "it is no earlier state of it"
            )
        return local

    def _create(self, connections: int) -> LocalImage:
        wanted = self._wanted
        base = (wanted.base, wanted.base_format) if wanted.base else None
        size, ours = self._image.size, self._ours()
        return create_image(self.path, wanted.format, size, connections, base, ours)

    def save(self, done: list[Range]) -> None:
        """Note that these ranges have come, and are on stable storage.

        Raises:
            LocalFailure: what is at FILE is not what was written: that must not be said of it.
        """
        self._require_ours()
        undone = self._image.changed.without(done) if self._wanted.in_place else None
        self._state.save(self._identity, done, undone)

    def distrust(self) -> None:
        """Note that nothing in the file is known to be right: the next run fetches all."""
        if self._wanted.in_place:
            self.save([])
        else:  # the state stays for those who would take the part for an image
            self._require_ours()
            self._state.save(replace(self._identity, kind=_WRONG), [])

    def fits(self, image: Image) -> bool:
        """Tell whether the server, asked again, says the same of the image."""
        return self._identity_of(image) == self._identity

    def _identity_of(self, image: Image) -> resume.Identity:
        return resume.identity(image.size, self._kind, self._url_path, image.data, image.zeros)

    def check_base(self) -> None:
        """Require what FILE is to be based on to be what it was.

        Raises:
            Different: it is not.
        """
        base = self._wanted.base
        if base and (
            is_half(base) or self._kind != self._wanted.kind() or not self._is_base_same()
        ):
            raise Different(f"{base}, the base, was changed meanwhile")

    def finish(self) -> None:
        """Put the part in FILE's place, for good."""
        self._require_ours()
        file = self._wanted.file
        with local_errors(file):
            if not self._wanted.in_place and self._wanted.force:
                require_replaceable(file)  # what is there by now
                os.replace(self.path, file)
            elif not self._wanted.in_place:
                rename_new(self.path, file)
            sync_folder(file)
        self._state.remove()
        self._half.remove()


class _Unfit(Exception):
    """What an earlier run has left cannot be gone on with; says why."""
