# SPDX-License-Identifier: Apache-2.0
"""The application over fake ports, as any WSGI server would call it."""

from collections.abc import Mapping
from typing import Any

from falcon import testing

from imageserver.core.errors import UnknownImage
from imageserver.core.reports import Journal
from imageserver.core.token import Token
from imageserver.core.transfer import Transfer
from imageserver.images.probing import Inspector
from imageserver.transfers.lookup import Catalogue
from imageserver.transfers.tracking import Tracker
from imageserver.web.app import App, create_app
from imageserver.web.body import ZERO_COPY
from imageserver.web.image_resource import Limits
from tests.unit.fakes import DISK, FILE_TRANSFER, TRANSFER, FakeBackends, World

#: Headers of every answer, where the request has the id r1.
COMMON = {
    "accept-ranges": "bytes",
    "access-control-allow-methods": "GET, PUT, OPTIONS",
    "cache-control": "no-store",
    "x-request-id": "r1",
}
JSON = {"content-type": "application/json"}
LIMITS = Limits(max_readers=8, max_writers=1, unix_socket=None)
READ_ONLY = Transfer("ro", DISK, read_only=True)
EXPIRING = Transfer("ex", DISK, idle_seconds=60)
WITH_TOKEN = Transfer("tok", DISK, idle_seconds=60, token=Token("s3cr3t"))


class Known:
    """``ports.Transfers``: those that the tests name."""

    def get(self, transfer_id: str) -> Transfer:
        for transfer in (TRANSFER, FILE_TRANSFER, READ_ONLY, EXPIRING, WITH_TOKEN):
            if transfer.id == transfer_id:
                return transfer
        raise UnknownImage(transfer_id)


def app_over(
    world: World,
    *journals: Journal,
    limits: Limits = LIMITS,
    shares_lock: bool = False,
    **how: Any,
) -> App:
    """Return the application over a fake world."""
    inspector = Inspector(FakeBackends(world), lambda _: None)
    tracker = Tracker(Catalogue(Known(), None, world.activities), lambda: None)
    opened = world.sessions(shares_lock=shares_lock)
    return create_app(tracker, opened, inspector, limits, journals, **how)


class Call:
    """One call of the application; ``status``, ``headers`` and the open ``pieces`` of its body."""

    def __init__(
        self,
        app: App,
        method: str,
        path: str,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
        **environ: Any,
    ) -> None:
        made = testing.create_environ(path=path, headers=headers, body=body)
        made |= {"REQUEST_METHOD": method, ZERO_COPY: False, **environ}
        self.pieces = app(made, self._start)

    def _start(self, status: str, headers: list[tuple[str, str]], *_: object) -> None:
        self.status = int(status.split(maxsplit=1)[0])
        self.headers = {name.lower(): value for name, value in headers}

    def read(self) -> bytes:
        """Take the whole body, then close it, as servers do."""
        body = b"".join(self.pieces)
        self.close()
        return body

    def close(self) -> None:
        close = getattr(self.pieces, "close", None)
        if close:
            close()


def error_of(result: testing.Result) -> tuple[int, str]:
    """Return an error's status and message."""
    assert result.json.keys() == {"error"}
    return result.status_code, result.json["error"]
