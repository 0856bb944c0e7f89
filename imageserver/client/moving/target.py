# SPDX-License-Identifier: Apache-2.0
"""The file that a download fills: what an earlier run left of it, and how it becomes FILE.

    FILE.part          what has come so far; a hole where nothing was written
    FILE.part.state    which ranges of it are on stable storage (``resume``)
    FILE               the finished part, renamed

An incremental download without --base writes FILE itself. Its state, FILE.incremental.state,
means that FILE is half old, half new; it is removed when FILE is complete. It lies beside the
file that FILE's symbolic links lead to, so that it is found by each of FILE's names.

A download is resumed if its state is of this image, the file has its length, and samples of it
equal the server's. Otherwise the user is told why, and the download starts again.
"""

import contextlib
import os
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import replace

from imageserver.client.failures import Different, InUse, LocalFailure
from imageserver.client.local.files import local_errors, rename_new, sync_folder
from imageserver.client.local.formats import LocalImage, create_image, open_image
from imageserver.client.local.qcow2_header import SECTOR
from imageserver.client.moving import resume
from imageserver.client.moving.file_locks import LockedFile, claimed, unchanged
from imageserver.client.moving.layout import Layout
from imageserver.client.moving.wanted import (
    Wanted,
    half_state,
    is_half,
    require_one_name,
    require_replaceable,
    state_beside,
)
from imageserver.client.plan import Range, Spans

#: ``kind`` in the state of a part that proved wrong: it is not resumed.
_WRONG = "different"


class Target:
    """The file for the image at ``url``."""

    def __init__(self, wanted: Wanted, layout: Layout, url: str) -> None:
        self._wanted, self._layout = wanted, layout
        self._url_path = urllib.parse.urlsplit(url).path
        self._kind = wanted.kind()
        self._identity = self._identity_of(layout)
        #: The file that is written: the part, or FILE itself.
        self.path = wanted.file if wanted.in_place else wanted.part
        # Where FILE is replaced, a file that it links to is not, nor is that file's state.
        beside = half_state(wanted.file) if wanted.in_place else state_beside(wanted.file)
        self._half = resume.State(beside)
        self._state = self._half if wanted.in_place else resume.State(f"{wanted.part}.state")
        self._locked: LockedFile
        self._is_base_same: Callable[[], bool] = lambda: True

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Lock FILE against other downloads, and the base against being written."""
        with contextlib.ExitStack() as held:
            ours = claimed(self.path, is_part=not self._wanted.in_place)
            self._locked = held.enter_context(ours)
            if self._wanted.in_place:  # again: a link may have been added
                require_one_name(self.path)
            elif self._locked.file.st_size and not self._state.exists():
                raise LocalFailure(
                    f"{self.path} is not what a download has left, for it has no state beside it: "
                    "move it away"
                )
            if self._wanted.force and not self._wanted.in_place:
                self._locked.be_as_private_as(self._wanted.file)
            if self._wanted.base:
                self._is_base_same = held.enter_context(unchanged(self._wanted.base))
            is_first = not self._state.exists()
            try:
                yield
            except BaseException:
                if is_first:
                    self._remove_state_of_nothing()
                raise

    def _remove_state_of_nothing(self) -> None:
        with contextlib.suppress(LocalFailure, OSError):
            if not self._wanted.in_place and not os.path.getsize(self.path):
                self._state.remove()

    def open(
        self,
        connections: int,
        compare: Callable[[LocalImage, Spans], None],
        note: Callable[[str], None],
    ) -> tuple[list[Range], LocalImage]:
        """Open the file to resume or start; return the ranges that are done, and the image.

        ``compare`` raises ``Different`` where samples of the image differ from the server's;
        ``note`` is told why an earlier run is not resumed.
        """
        saved = self._state.load()
        if self._wanted.in_place:
            resume.require_whole(self._half, self._wanted.file, self._layout.changed)
        if self._state.exists() and not self._wanted.restart:
            try:
                done = self._fitting(saved)
                return done, self._reopened(done, connections, compare)
            except _Unfit as exc:
                note(f"{exc}: starting again.")
        if self._wanted.in_place:  # its state stays until ``save`` replaces it
            return [], self._open_base(connections)
        self.distrust()  # before there are bytes: without a state they would look like an image
        return [], self._create(connections)

    def _fitting(self, saved: resume.Saved | None) -> list[Range]:
        """Return the ranges that are done, if the state is of this image."""
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
        """Open the file of an earlier run, if it equals the server's image where it is done."""
        with contextlib.ExitStack() as closing:
            local = closing.enter_context(contextlib.closing(self._as_left(connections)))
            data = self._layout.data
            try:
                compare(local, data.without(data.without(done)))
            except Different as exc:
                raise _Unfit(f"{self.path} is not what the server has now") from exc
            if not self._layout.is_mapped:  # zeros will not be written: remove what is there
                for start, stop in Spans(done).gaps(self._layout.size):
                    local.zero(start, stop)
            closing.pop_all()
            return local

    def _as_left(self, connections: int) -> LocalImage:
        unlike = _Unfit(f"{self.path} is not as it was left")
        if not os.path.getsize(self.path):
            raise unlike
        try:
            local = self._open_part(connections)
        except InUse:  # by the qemu-nbd of a run that was killed, perhaps
            raise
        except LocalFailure as exc:
            raise unlike from exc
        if local.size != self._local_size():
            local.close()
            raise unlike
        return local

    def _local_size(self) -> int:
        """Return the length of the local image: qcow2 has whole sectors only."""
        block = 1 if self._wanted.format == "raw" else SECTOR
        return -(-self._layout.size // block) * block

    def _open_part(self, connections: int) -> LocalImage:
        kind, ours = self._wanted.format, self._locked.file
        return open_image(self.path, kind, connections, writable=True, ours=ours)

    def _open_base(self, connections: int) -> LocalImage:
        local = self._open_part(connections)
        if local.size != self._local_size():
            local.close()
            raise LocalFailure(
                f"{self.path} has {local.size} bytes, the image {self._layout.size}: "
                "it is no earlier state of it"
            )
        return local

    def _create(self, connections: int) -> LocalImage:
        wanted = self._wanted
        base = (wanted.base, wanted.base_format) if wanted.base else None
        size, ours = self._layout.size, self._locked.file
        return create_image(self.path, wanted.format, size, connections, base, ours)

    def save(self, done: list[Range]) -> None:
        """Write to the state that these ranges are on stable storage.

        Raises:
            LocalFailure: the path leads to another file than the one that was written.
        """
        self._locked.require()
        undone = self._layout.changed.without(done) if self._wanted.in_place else None
        self._state.save(self._identity, done, undone)

    def distrust(self) -> None:
        """Write to the state that the file may be wrong: the next run fetches everything."""
        self._locked.require()
        try:
            if self._wanted.in_place:
                self.save([])
            else:  # a state must stay beside the part: it is no image
                self._state.save(replace(self._identity, kind=_WRONG), [])
        except LocalFailure:
            if not self._state.exists():
                raise
            self._state.spoil()  # the disk is full

    def fits(self, layout: Layout) -> bool:
        """Tell whether a later layout of the image is the same."""
        return self._identity_of(layout) == self._identity

    def _identity_of(self, layout: Layout) -> resume.Identity:
        return resume.identity(layout.size, self._kind, self._url_path, layout.data, layout.zeros)

    def check_base(self) -> None:
        """Require FILE's base not to have changed.

        Raises:
            Different: it has.
        """
        base = self._wanted.base
        if base and (
            is_half(base) or self._kind != self._wanted.kind() or not self._is_base_same()
        ):
            raise Different(f"{base}, the base, was changed meanwhile")

    def finish(self) -> None:
        """Rename the part to FILE, and remove the states."""
        self._locked.require()
        self._locked.be_as_before()
        file = self._wanted.file
        with local_errors(file):
            if not self._wanted.in_place and self._wanted.force:
                require_replaceable(file)  # it may be another file by now
                os.replace(self.path, file)
            elif not self._wanted.in_place:
                rename_new(self.path, file)
            sync_folder(file)
        self._state.remove()
        self._half.remove()


class _Unfit(Exception):
    """An earlier run cannot be resumed; ``str()`` says why."""
