# SPDX-License-Identifier: Apache-2.0
"""What all users can do, and those who only read. Each task is short: a run's end waits for it."""

import random
from functools import partial
from typing import Any, ClassVar

from lab.model import WrongBytes, check_extents
from locust import User, between, task
from locust.exception import StopUser

from loading.client import Answer, Call, Client, Unexpected
from loading.images import Image, needed, pieces
from loading.ledger import Kind
from loading.run import Run

#: As large as backup and restore tools ask.
PIECE = 1 << 20
#: Of one survey, so that a task ends soon.
_PIECES_OF_A_BACKUP = 16


class LoadUser(User):
    """A user with a connection and a random source of its own."""

    abstract = True
    wait_time = between(0, 0.05)
    kind: ClassVar[str]
    run_of: ClassVar[Run | None] = None
    """Set when a run starts."""

    def new_client(self) -> Client:
        """Return another connection of this user's."""
        return Client(self.plan.host, self.kind, self.plan.reporter)

    def on_start(self) -> None:
        """Connect, and count as there."""
        if self.run_of is None:
            raise StopUser
        self.plan = self.run_of
        self.client = self.new_client()
        self.choose = random.Random()
        self.plan.present.add(self.kind)

    def on_stop(self) -> None:
        """Hang up."""
        if self.run_of:
            self.client.close()

    def read(  # noqa: PLR0913, PLR0917 - what, where, and how far it has come
        self,
        name: str,
        image: Image,
        span: tuple[int, int],
        path: str = "",
        client: Client | None = None,
        on_head: Any = lambda: None,  # noqa: ANN401 - a callback
    ) -> Answer | None:
        """Read [start, stop) of an image, by another id if ``path`` says so, and check it."""
        start, stop = span
        part = start > 0 or stop < image.size or not image.is_whole
        fields = {"Range": f"bytes={start}-{stop - 1}"} if part else {}
        good = (206,) if part else (200,)
        path = path or image.path
        call = Call(name, "GET", path, good, Kind.READ, image.lockable, fields)
        with image.reading(start, stop) as read:

            def check(answer: Answer) -> None:
                image.check(read, start, stop, answer.body)

            return (client or self.client).ask(call, check, on_head)

    def survey(
        self, name: str, image: Image, *, dirty: bool = False, path: str = ""
    ) -> list[dict[str, Any]]:
        """Ask for an image's extents, and check them; none where it was refused or failed."""
        path = f"{path or image.path}/extents?context={'dirty' if dirty else 'zero'}"
        if not image.is_whole:
            path += f"&start=0&length={image.size}"
        call = Call(name, "GET", path, kind=Kind.EXTENTS, image=image.lockable)
        with image.reading(0, image.size) as read:

            def check(answer: Answer) -> None:
                if answer.body not in image.surveyed:
                    check_extents(answer.json, image, read, dirty=dirty)
                    if image.model is None:
                        image.surveyed.add(answer.body)

            answer = self.client.ask(call, check)
        found: list[dict[str, Any]] = answer.json if answer and not answer.refused else []
        return found

    def span_in(self, image: Image) -> tuple[int, int]:
        """Return some range of an image."""
        start = self.choose.randrange(image.size)
        return start, min(image.size, start + self.choose.choice((1, 4096, 65536, PIECE)))


class LoadBalancer(LoadUser):
    """Probes the server and its images. Never refused, whatever else goes on."""

    kind = "probe"
    weight = 2
    wait_time = between(0.01, 0.1)

    @task(3)
    def probe_server(self) -> None:
        """Ask the server what it can do."""
        self.client.ask(Call("OPTIONS /images/*", "OPTIONS", "/images/*"), self._check_limits)

    @task(3)
    def probe_image(self) -> None:
        """Ask what an image can do."""
        if self.plan.images:
            image = self.choose.choice(self.plan.images)
            self.client.ask(Call("OPTIONS", "OPTIONS", image.path), partial(self._check, image))

    @task
    def look_at_head(self) -> None:
        """Ask how large an image is."""
        if self.plan.images:
            image = self.choose.choice(self.plan.images)
            self.client.ask(Call("HEAD", "HEAD", image.path), partial(self._check_size, image))

    def _check_limits(self, answer: Answer) -> None:
        if answer.json != self.plan.server:
            raise Unexpected(f"what the server can do has changed: {answer.body!r}")

    def _check(self, image: Image, answer: Answer) -> None:
        if ("extents" in answer.json["features"]) != image.is_nbd:
            raise Unexpected(f"what {image.lockable.name} can do has changed: {answer.body!r}")

    def _check_size(self, image: Image, answer: Answer) -> None:
        size = int(answer.fields["content-length"])
        if size < image.size or (size > image.size and image.is_whole):
            raise WrongBytes(f"Content-Length is {size}, the image has {image.size}")


class BackupReader(LoadUser):
    """Walks an image's extents, then reads what they say is needed; or reads it whole."""

    kind = "backup"
    weight = 8

    @task(4)
    def full(self) -> None:
        """Back up all that is not zero."""
        self._walk(dirty=False)

    @task(4)
    def incremental(self) -> None:
        """Back up what has changed."""
        self._walk(dirty=True)

    @task
    def whole(self) -> None:
        """Read an image in one go."""
        if image := self._choose_image(self.plan.images):
            self.read("GET", image, (0, image.size))

    def _walk(self, *, dirty: bool) -> None:
        image = self._choose_image(self.plan.images)
        if image is None:
            return
        if image.is_nbd:
            context = "dirty" if dirty else "zero"
            ranges = needed(self.survey(f"GET extents {context}", image, dirty=dirty))
        else:
            ranges = [(0, image.size)]
        todo = pieces(ranges, PIECE)
        first = self.choose.randrange(max(1, len(todo) - _PIECES_OF_A_BACKUP))
        for span in todo[first : first + _PIECES_OF_A_BACKUP]:
            answer = self.read("GET range", image, span)
            if answer is None or answer.refused:
                return

    def _choose_image(self, images: list[Image]) -> Image | None:
        # One to write says nothing before it has been written for the first time.
        ready = [image for image in images if image.size and image not in self.plan.unready]
        return self.choose.choice(ready) if ready else None
