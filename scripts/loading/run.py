# SPDX-License-Identifier: Apache-2.0
"""What the users of one run share: the server's limits, its images, and the reporter."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from imageserver.backends.table import KINDS
from imageserver.client.local.control_socket import ControlSocket
from imageserver.client.local.transfer_files import ConfigDirectory
from imageserver.core.transfer import Transfer, parse_transfer
from loading.client import Answer, Call, Client, Reporter, told
from loading.images import WINDOW, Image
from loading.ledger import Image as Lockable
from loading.ledger import Ledger, Limits
from loading.parameters import Parameters, Readable

#: How a control program makes and ends transfers; both count when the call returns.
Registrar = ConfigDirectory | ControlSocket


class NotReady(Exception):
    """The server or an image is not as the parameters say; ``str()`` says how."""


class Run:
    """One run against one server."""

    def __init__(self, host: str, parameters: Parameters, fire: Callable[..., None]) -> None:
        """Look at the server and its images; ``fire``: locust's request event.

        Raises:
            NotReady: they cannot be used.
        """
        self.host = host
        self.present: set[str] = set()
        """The kinds of users that there have been."""
        self._problems: list[str] = []
        look = Reporter(Ledger(Limits(0, 0)), self._note, others=False)
        with contextlib.closing(Client(host, "set-up", look)) as client:
            self.server = self._ask(client, "OPTIONS", "/images/*").json
            self.readable = [self._readable(client, found) for found in parameters.read]
            self.writable = [self._writable(client, name) for name in parameters.write]
        limits = Limits(self.server["max_readers"], self.server["max_writers"])
        self.reporter = Reporter(Ledger(limits), fire, others=parameters.others)
        self.images = self.readable + self.writable
        self.unclaimed = list(self.writable)
        self.unready = list(self.writable)
        self.registrars: dict[str, Registrar] = {}
        self.sources: list[tuple[Image, Transfer]] = []
        if parameters.config_dir:
            self.registrars["file"] = ConfigDirectory(str(parameters.config_dir))
            for image in self.readable:
                with contextlib.suppress(FileNotFoundError):
                    text = (parameters.config_dir / image.id).read_bytes()
                    transfer = parse_transfer(image.id, text, KINDS)
                    self.sources.append((image, replace(transfer, read_only=True)))
        if parameters.control_socket:
            self.registrars["socket"] = ControlSocket(str(parameters.control_socket))

    @contextlib.contextmanager
    def measured(self, kind: str, name: str, *failures: type[Exception]) -> Iterator[None]:
        """Tell locust how long a block takes, and whether it fails."""
        began = time.perf_counter()
        problem: Exception | None = None
        try:
            yield
        except failures as exc:
            problem = exc
        self.reporter.fire(**told(kind, name, began, 0, problem))

    def _note(self, *, exception: Exception | None, **_fields: object) -> None:
        if exception:
            self._problems.append(str(exception))

    def _ask(self, client: Client, method: str, path: str) -> Answer:
        answer = client.ask(Call("look", method, path))
        if answer is None:
            raise NotReady(f"{method} {path}: {self._problems[-1]}")
        return answer

    def _readable(self, client: Client, found: Readable) -> Image:
        image = self._look(client, found.id)
        try:
            if found.content:
                image.content = found.content.read_bytes()
            if found.base:
                image.base = found.base.read_bytes()
        except OSError as exc:
            raise NotReady(f"{found.id}: {exc}") from exc
        for path, data in ((found.content, image.content), (found.base, image.base)):
            if data is not None and len(data) != image.size:
                raise NotReady(f"{found.id} has {image.size} bytes, {path} has {len(data)}")
        return image

    def _writable(self, client: Client, transfer_id: str) -> Image:
        image = self._look(client, transfer_id)
        if image.size > WINDOW:
            if not image.is_nbd:
                raise NotReady(f"{transfer_id} is a file of over {WINDOW >> 20} MiB")
            image.size, image.is_whole = WINDOW, False
        if not image.size:
            raise NotReady(f"{transfer_id} is empty: what could be read back?")
        return image

    def _look(self, client: Client, transfer_id: str) -> Image:
        path = f"/images/{transfer_id}"
        is_nbd = "extents" in self._ask(client, "OPTIONS", path).json["features"]
        size = int(self._ask(client, "HEAD", path).fields["content-length"])
        return Image(transfer_id, Lockable(transfer_id, is_nbd), size, is_whole=True)
