# SPDX-License-Identifier: Apache-2.0
"""Who makes, changes and ends transfers while they are used."""

import contextlib
import uuid
from collections.abc import Iterator
from dataclasses import replace

import gevent
from gevent.event import Event
from locust import between, task

from imageserver.client.failures import ClientError
from imageserver.client.local.control_socket import ControlSocket
from loading.client import Answer, Call, Unexpected
from loading.images import Image
from loading.users import LoadUser

#: Longer than a request in flight takes to end: unregistering waits for those.
_UNREGISTER_SECONDS = 80.0


class ControlProgram(LoadUser):
    """Makes, changes and ends transfers; each change must count in the very next request."""

    kind = "control"
    wait_time = between(0.02, 0.2)

    @task(2)
    def make_and_end(self) -> None:
        """Make a transfer, use it, end it."""
        registrar, name = self._begin()
        self._is_gone(name)
        with self._transfer(registrar, name) as image:
            self.client.ask(Call("OPTIONS new", "OPTIONS", f"/images/{name}"))
            self.read("GET new", image, self.span_in(image), f"/images/{name}")
            if image.is_nbd:
                self.survey("GET extents new", image, path=f"/images/{name}")
        self._is_gone(name)

    @task
    def change_image(self) -> None:
        """Let a transfer name another image."""
        registrar, name = self._begin()
        with self._transfer(registrar, name):
            self.client.ask(Call("OPTIONS new", "OPTIONS", f"/images/{name}"))
            image = self._make(registrar, name)
            self.read("GET changed", image, self.span_in(image), f"/images/{name}")
        self._is_gone(name)

    @task
    def end_in_flight(self) -> None:
        """End a transfer whose image is being read: that read is finished, no other begins."""
        registrar, name = self._begin()
        has_begun = Event()

        def read(image: Image) -> None:
            with contextlib.closing(self.new_client()) as other:
                span, path = (0, image.size), f"/images/{name}"
                self.read("GET while ended", image, span, path, other, has_begun.set)

        with self._transfer(registrar, name) as image:
            reader = gevent.spawn(read, image)
            reader.link(lambda _: has_begun.set())
            try:
                has_begun.wait()
            except BaseException:  # the run is over: the read must not begin after the transfer
                reader.kill()
                raise
        self._is_gone(name)
        reader.get()

    def _begin(self) -> tuple[str, str]:
        return self.choose.choice(list(self.plan.registrars)), str(uuid.uuid4())

    @contextlib.contextmanager
    def _transfer(self, registrar: str, name: str) -> Iterator[Image]:
        image = self._make(registrar, name)
        try:
            yield image
        finally:
            with self.plan.measured(self.kind, f"end {registrar}", ClientError):
                registered = self.plan.registrars[registrar]
                if isinstance(registered, ControlSocket):
                    registered.remove(name, _UNREGISTER_SECONDS, force=False)
                else:
                    registered.remove(name)

    def _make(self, registrar: str, name: str) -> Image:
        image, transfer = self.choose.choice(self.plan.sources)
        with self.plan.measured(self.kind, f"make {registrar}", ClientError):
            self.plan.registrars[registrar].add(replace(transfer, id=name))
        return image

    def _is_gone(self, name: str) -> None:
        for method in ("OPTIONS", "GET"):
            call = Call(f"{method} unknown", method, f"/images/{name}", good=(404,))
            self.client.ask(call, _check_unknown)


def _check_unknown(answer: Answer) -> None:
    if answer.error != "unknown image_id":
        raise Unexpected(f"404 {answer.error}")
