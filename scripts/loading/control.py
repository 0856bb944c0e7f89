# SPDX-License-Identifier: Apache-2.0
"""Who makes and ends transfers, without patience: each change counts in the very next request."""

import contextlib
import uuid
from collections.abc import Iterator

import gevent
from gevent.event import Event
from locust import between, task

from loading.client import Answer, Call, Unexpected
from loading.doors import Door, DoorFailed
from loading.images import Image
from loading.users import LoadUser


class ControlProgram(LoadUser):
    """Makes and ends transfers, and is impatient: each must count in the very next request."""

    kind = "control"
    wait_time = between(0.02, 0.2)

    @task(2)
    def come_and_go(self) -> None:
        """Make a transfer, use it, end it."""
        door = self.choose.choice(self.plan.doors)
        transfer_id = str(uuid.uuid4())
        self._is_gone(transfer_id)
        with self._transfer(door, transfer_id) as image:
            self._probe(transfer_id, "OPTIONS new")
            self.read(self.client, "GET new", image, self.span_in(image), f"/images/{transfer_id}")
            if image.is_nbd:
                self.survey("GET extents new", image, path=f"/images/{transfer_id}")
        self._is_gone(transfer_id)

    @task
    def change_its_mind(self) -> None:
        """Let a transfer name another image."""
        door = self.choose.choice(self.plan.doors)
        transfer_id = str(uuid.uuid4())
        with self._transfer(door, transfer_id):
            self._probe(transfer_id, "OPTIONS new")
            image = self._make(door, transfer_id)
            path = f"/images/{transfer_id}"
            self.read(self.client, "GET changed", image, self.span_in(image), path)
        self._is_gone(transfer_id)

    @task
    def end_in_flight(self) -> None:
        """End a transfer whose image is being read: that read is finished, no other begins."""
        door = self.choose.choice(self.plan.doors)
        transfer_id = str(uuid.uuid4())
        has_begun = Event()
        with contextlib.closing(self.new_client()) as other:
            with self._transfer(door, transfer_id) as image:
                reader = gevent.spawn(
                    self.read,
                    other,
                    "GET while ended",
                    image,
                    (0, image.size),
                    f"/images/{transfer_id}",
                    has_begun.set,
                )
                reader.link(lambda _: has_begun.set())
                has_begun.wait()
            self._is_gone(transfer_id)
            reader.get()

    @contextlib.contextmanager
    def _transfer(self, door: Door, transfer_id: str) -> Iterator[Image]:
        image = self._make(door, transfer_id)
        try:
            yield image
        finally:
            with self.plan.measured(self.kind, f"end {door.name}", DoorFailed, OSError):
                door.end(transfer_id)

    def _make(self, door: Door, transfer_id: str) -> Image:
        image, fields = self.choose.choice(self.plan.sources)
        with self.plan.measured(self.kind, f"make {door.name}", DoorFailed, OSError):
            door.make(transfer_id, fields)
        return image

    def _probe(self, transfer_id: str, name: str) -> None:
        self.client.ask(Call(name, "OPTIONS", f"/images/{transfer_id}"))

    def _is_gone(self, transfer_id: str) -> None:
        path = f"/images/{transfer_id}"
        for method in ("OPTIONS", "GET"):
            self.client.ask(Call(f"{method} unknown", method, path, good=(404,)), _check_unknown)


def _check_unknown(answer: Answer) -> None:
    if answer.error != "unknown image_id":
        raise Unexpected(f"404 {answer.error}")
