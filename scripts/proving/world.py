# SPDX-License-Identifier: Apache-2.0
"""A whole server but for its sockets, in this process: every module that a request goes through.

Only what accepts connections is left out. So one process can make thousands of requests, each
with another fault, and look after each at what is left: descriptors, files, locks, slots.
"""

import contextlib
import fcntl
import io
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from falcon import testing
from lab.servers import put_transfer

from imageserver.core.errors import ImageServerError
from imageserver.core.ports import Owned
from imageserver.core.slots import Kind
from imageserver.core.transfer import id_hash
from imageserver.process import Process
from imageserver.server.startup import take_over
from imageserver.settings import Settings

#: A thread that closes a descriptor may take so long.
_PATIENCE_SECONDS = 0.5
#: A file has an ETag when it was left alone for 2 s.
_ETAG_SECONDS = 10
_PREFIX = "IMAGESERVER_"


@dataclass
class Answer:
    """What a client gets. ``cut``: the connection was cut; ``wrong``: what no request may do."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    cut: bool = False
    wrong: str = ""

    @property
    def json(self) -> Any:  # noqa: ANN401 - whatever it says
        """The body as JSON; None where it is none."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None


class World:
    """A server's process in a directory of its own, with ``settings`` as keywords."""

    def __init__(self, **settings: object) -> None:
        self._opened = contextlib.ExitStack()
        name = self._opened.enter_context(tempfile.TemporaryDirectory(prefix="is-proof-"))
        self.top = Path(name)
        self.images = self.top / "images"
        self.config = self.top / "config"
        self.runtime = self.top / "run"
        for directory in (self.images, self.config):
            directory.mkdir(mode=0o700)
        values = {
            "config_dir": self.config,
            "runtime_dir": self.runtime,
            "control_socket": self.top / "control",
            "chunk_size": 65536,
            "nbd_idle_seconds": 0,
            "log_level": "error",
        } | settings
        environ = {f"{_PREFIX}{name.upper()}": str(value) for name, value in values.items()}
        self.process = Process(Settings.from_environ(environ, {}))
        take_over(self.process)
        self._before: set[str] = set()

    def add(self, name: str, **fields: object) -> None:
        """Make a transfer known by a file."""
        put_transfer(self.config, name, fields)

    def ask(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> Answer:
        """Make one request, as the server makes it of what a client sends."""
        path, _, query = path.partition("?")
        environ = testing.create_environ(path, query, headers=dict(headers or {}), method=method)
        environ["wsgi.input"] = io.BytesIO(body)
        if body or method == "PUT":
            environ["CONTENT_LENGTH"] = str(len(body))
        answer = Answer()

        def start(
            status: str, headers: list[tuple[str, str]], _error: object = None, /
        ) -> Callable[[bytes], object]:
            answer.status = int(status[:3])
            answer.headers = {name.lower(): value for name, value in headers}
            return answer.body.__add__  # what PEP 3333 has for old applications

        try:
            pieces = self.process.application(environ, start)
            try:
                for piece in pieces:
                    answer.body += piece
            finally:
                if hasattr(pieces, "close"):
                    pieces.close()
        except ImageServerError:
            answer.cut = True
        except Exception as exc:  # noqa: BLE001 - it would be a traceback in the log
            answer.cut, answer.wrong = True, f"{type(exc).__name__} escapes: {exc}"
        if answer.body == b'{"error":"internal error"}':
            answer.wrong = "a traceback, and 500 internal error"
        return answer

    def etag(self, target: str) -> str:
        """Return the ETag of a target, as soon as it has one.

        Raises:
            TimeoutError: it gets none.
        """
        deadline = time.monotonic() + _ETAG_SECONDS
        while not (etag := self.ask("HEAD", target).headers.get("etag", "")):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{target} has no ETag")
            time.sleep(0.05)
        return etag

    def settle(self) -> None:
        """Remember which descriptors are open now: as many may be later."""
        self._before = _descriptors()

    def left(self) -> Iterator[str]:
        """Yield what is held, or left behind, though no request is under way."""
        slots = self.process.slots
        for holder in slots.holders(Kind.READ, Kind.WRITE, Kind.OTHER):
            yield f"a slot: {holder.operation} {holder.transfer}"
        files = [*(self.runtime / "locks").iterdir(), self.runtime / "registered.lock"]
        for path in (*files, self.runtime / "slots"):
            if path.exists() and not _is_free(path):
                yield f"a lock: {path.name}"
        for transfer in self.process.registrations.all():
            activity = self.process.usage.find(Owned.REGISTERED, transfer.id, visit=False)
            if activity:
                with contextlib.closing(activity):
                    if activity.visitors():
                        yield f"a visit: {transfer.id}"
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while (more := self._new_descriptors()) and time.monotonic() < deadline:
            time.sleep(0.002)
        for name in more:
            yield f"a descriptor: {name}"

    def _new_descriptors(self) -> set[str]:
        more = _descriptors() - self._before
        marks = [text for text in more if text.endswith("/run/slots")]
        # A process opens it once more when it has something to tell the others (``Marks``).
        return more - set(marks) if len(marks) == 1 else more

    def registrations(self) -> set[str]:
        """Return the ids of what is registered, and the names of other files there."""
        known = {id_hash(it.id): it.id for it in self.process.registrations.all()}
        return {known.get(path.name, path.name) for path in (self.runtime / "registered").iterdir()}

    def close(self) -> None:
        """Let everything go."""
        self.process.drain()
        self.process.slots.close()
        self.process.runtime.close()
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


def _descriptors() -> set[str]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.add(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
    return {text for text in found if not text.endswith("/fd")}


def _is_free(path: Path) -> bool:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True
