# SPDX-License-Identifier: Apache-2.0
"""One image on a server: what it can do, where its data is, its bytes. No request is retried here.

Works with imageserver and with oVirt's daemon: it uses what both understand.
"""

import contextlib
import json
import os
import re
from base64 import b64encode
from collections.abc import Generator, Iterable, Iterator
from typing import Any
from urllib.parse import quote

from imageserver.client.failures import Broken, Failed, Mismatch, Refused
from imageserver.client.http.access import Access
from imageserver.client.http.answers import (
    Abilities,
    check_range,
    parse_abilities,
    parse_bitmap,
    parse_checksum,
    parse_fields,
    parse_size,
    range_size,
)
from imageserver.client.http.extent_list import parse_extents
from imageserver.client.http.transport import Response, Transport, finish
from imageserver.core.extents import Extent

#: Bytes of extents that are parsed at once: much for json's speed, little for millions of extents.
_EXTENTS_PIECE = 256 * 1024
#: Bytes of one read from a socket and one write to a file.
READ_BYTES = 1024 * 1024
_MAX_JSON = 64 * 1024
_NO_CONTENT, _OUTSIDE = 204, 416
#: What oVirt's daemon has in ``Server``; it answers writes with an empty body.
_OVIRT = "imageio/"
_DIGEST = "Content-Digest"
#: What imageserver says of a body that has another one (docs/api.md).
_MISMATCH = f"does not match its {_DIGEST}"
#: How long a checksum may take, in seconds; oVirt's daemon says nothing until it has one.
_CHECKSUM_SECONDS = 86400.0
#: Connections that are used by default.
_CONNECTIONS = 4


class Remote:
    """An image behind a URL; may be used by several threads at once."""

    def __init__(self, access: Access, connections: int = 8) -> None:
        self.url = access.url
        self._is_local = access.is_local
        self._transport = Transport(access, connections)
        self._path = self._transport.target.rstrip("/")
        self._target = self._at()
        #: What the last dirty extents rest on; "": no bitmap, so all is dirty. None: not known.
        self.bitmap: str | None = None
        self._is_ovirt = False
        self._size: int | None = None

    def close(self) -> None:
        """Close the connections that are idle."""
        self._transport.close()

    def cut(self) -> None:
        """End all connections: threads that wait for one get ``Broken``."""
        self._transport.cut()

    def connections(self, asked: int | None, most: int) -> int:
        """Return how many connections to use of the ``most`` that the server allows.

        By default four. With a server on this machine half as many as there are CPUs: each
        connection keeps two CPUs busy (on two CPUs, four connections take 1.2 times as long as
        one).
        """
        if asked is None:
            cpus = len(os.sched_getaffinity(0))
            asked = min(_CONNECTIONS, cpus // 2) if self._is_local else _CONNECTIONS
        return max(1, min(asked, most))

    def abilities(self) -> Abilities:
        """Ask what the image can do (OPTIONS)."""
        try:
            response = self._transport.request("OPTIONS", self._target, expected=(200, 204))
        except Refused as exc:
            if "/images/" in self._target:
                raise
            raise Refused(f"{exc} (an image's URL ends in /images/ID)", exc.code) from exc
        allow = response.headers.get("Allow") or response.headers.get(
            "Access-Control-Allow-Methods", ""
        )
        self._is_ovirt = response.headers.get("Server", "").startswith(_OVIRT)
        body = self._body(response)
        if not body and response.status != _NO_CONTENT:
            raise Failed("OPTIONS was answered with nothing: this is no image server")
        return parse_abilities(body, allow)

    def size(self) -> int:
        """Ask for the image's size in bytes (HEAD, or a range where there is no HEAD).

        From then on no range may be of an image of another size.
        """
        self._size = self._asked_size()
        return self._size

    def _asked_size(self) -> int:
        try:
            length = self._head().headers.get("Content-Length", "")
            if re.fullmatch("[0-9]+", length):
                return parse_size(length)
        except Refused as exc:
            if exc.code not in {400, 405, 501}:
                raise
        response = self._transport.request(
            "GET", self._target, expected=(206, 416), headers={"Range": "bytes=0-0"}
        )
        finish(response)
        return range_size(response.headers)

    def _head(self) -> Response:
        response = self._transport.request("HEAD", self._target)
        response.drain_conn()
        return response

    def extents(self, context: str = "zero") -> Generator[Extent]:
        """Yield all extents in order: ``context`` is zero or dirty.

        Do not ask for those of an empty image: oVirt's daemon answers with an error.

        Raises:
            Broken: the list was cut.
            Failed: it has gaps, or does not say what was asked for.
        """
        response = self._transport.request("GET", self._at("/extents", f"context={context}"))
        self.bitmap = parse_bitmap(response.headers) if context == "dirty" else None
        self._transport.allow_blanks(response)
        with _read_to_the_end(response):
            yield from parse_extents(self._pieces(response), context)

    def _pieces(self, response: Response) -> Iterator[bytes]:
        with self._transport.translated():
            yield from response.stream(_EXTENTS_PIECE)

    def checksum(
        self, algorithm: str, block_size: int | None, span: tuple[int, int] | None = None
    ) -> str:
        """Ask for the hex of a checksum of the image, or of a span of it (``has_spans``).

        Raises:
            Refused: the server cannot compute this one.
        """
        wanted = f"algorithm={quote(algorithm)}"
        if block_size is not None:
            wanted += f"&block_size={block_size}"
        if span is not None:
            wanted += f"&start={span[0]}&length={span[1] - span[0]}"
        patience = _CHECKSUM_SECONDS if self._is_ovirt else None
        response = self._transport.request(
            "GET", self._at("/checksum", wanted), silent_seconds=patience
        )
        self._transport.allow_blanks(response, _CHECKSUM_SECONDS)
        return parse_checksum(self._body(response), algorithm, block_size)

    def has_spans(self, size: int) -> bool:
        """Tell whether the server computes checksums of spans: one behind the end is 416 then."""
        if self._is_ovirt:
            return False
        try:
            response = self._transport.request(
                "GET", self._at("/checksum", f"start={size}&length=1")
            )
        except Refused as exc:
            if exc.code != _OUTSIDE:
                raise
            return True
        response.close()
        return False

    def read(self, start: int, stop: int) -> Generator[bytes | bytearray]:
        """Yield the bytes of a span in order; a piece is overwritten when the next one is read.

        Raises:
            Broken: the answer was cut; all bytes that came were yielded before.
        """
        response = self._ask_for(start, stop)
        with _read_to_the_end(response):
            check_range(response.headers, start, stop, self._size)
            yield from self._received(response, start, stop)

    def _ask_for(self, start: int, stop: int) -> Response:
        headers = {"Range": f"bytes={start}-{stop - 1}"}
        return self._transport.request("GET", self._target, expected=(206,), headers=headers)

    def _received(self, response: Response, start: int, stop: int) -> Iterator[bytes | bytearray]:
        """Yield a body in pieces that end at multiples of ``READ_BYTES``, as blocks of zeros do."""
        buffer = bytearray(min(READ_BYTES, stop - start))
        view = memoryview(buffer)
        while start < stop:
            filled, end = 0, min(READ_BYTES - start % READ_BYTES, stop - start)
            try:
                while filled < end:
                    filled += self._transport.read_into(response, view[filled:end])
            except Broken:
                if filled:
                    yield bytes(view[:filled])
                raise
            yield buffer if filled == len(buffer) else bytes(view[:filled])
            start += filled

    def write(
        self, start: int, stop: int, pieces: Iterable[object], sha256: bytes | None = None
    ) -> None:
        """Write a span (PUT with Content-Range); the pieces must add up to its length.

        ``sha256``: their digest, which the server verifies.

        Raises:
            Mismatch: it is not that of the bytes that came; they are in the image.
        """
        place = {"Content-Range": f"bytes {start}-{stop - 1}/*", **digest_field(sha256)}
        # oVirt's daemon flushes after each PUT unless told not to.
        self._put(stop - start, pieces, "flush=n", place)

    def put(
        self, length: int, pieces: Iterable[object], *, flush: bool, sha256: bytes | None = None
    ) -> bool:
        """Replace the image by ``length`` bytes; return whether the server flushed it.

        A server that does not say is taken to have done what it was asked. ``sha256``: as for
        ``write``; a file that does not match is not replaced.
        """
        fields = self._put(length, pieces, f"flush={'ny'[flush]}", digest_field(sha256))
        flushed = fields.get("flushed")
        return flushed if isinstance(flushed, bool) else flush

    def _put(
        self, length: int, pieces: Iterable[object], flush: str, place: dict[str, str]
    ) -> dict[str, Any]:
        """Send a body; return the fields of the answer.

        Raises:
            Broken: the answer came before the body was sent (urllib3 returns such an answer, too).
        """
        headers = {"Content-Length": str(length), "Content-Type": "application/octet-stream"}
        body = _Body(pieces)
        try:
            response = self._transport.request(
                "PUT", self._at("", flush), headers=headers | place, body=body
            )
        except Refused as exc:
            if _DIGEST in place and _MISMATCH in str(exc):
                raise Mismatch(str(exc), exc.code) from exc
            raise
        if not body.is_sent:
            response.close()
            raise Broken(f"{self._transport.name} answered PUT before it had taken all bytes")
        fields = self._done("PUT", response)
        taken = fields.get("bytes_written", length)
        if type(taken) is not int or taken != length:
            raise Failed(f"{self._transport.name} was sent {length} bytes and took {taken!s:.20}")
        return fields

    def zero(self, start: int, stop: int) -> None:
        """Zero a span."""
        self._patch({"op": "zero", "offset": start, "size": stop - start, "flush": False})

    def flush(self) -> None:
        """Bring all written data to stable storage (PATCH)."""
        self._patch({"op": "flush"})

    def _at(self, route: str = "", parameter: str = "") -> str:
        return (self._path + route or "/") + (f"?{parameter}" if parameter else "")

    def _patch(self, fields: dict[str, object]) -> None:
        body = json.dumps(fields).encode()
        headers = {"Content-Type": "application/json"}
        response = self._transport.request("PATCH", self._target, headers=headers, body=body)
        self._done("PATCH", response)

    def _done(self, method: str, response: Response) -> dict[str, Any]:
        """Return the fields of an answer, which must say ``ok``; oVirt's daemon sends no body."""
        body = self._body(response)
        if not body and response.headers.get("Server", "").startswith(_OVIRT):
            return {}
        fields = parse_fields(body)
        if fields.get("ok") is not True:
            why = f": {fields['error']!s:.300}" if "error" in fields else ""
            raise Failed(
                f"{self._transport.name} answered {method} with {response.status}, "
                f"but does not say that it is done{why}"
            )
        return fields

    def _body(self, response: Response) -> bytes:
        with self._transport.translated():
            body = response.read(_MAX_JSON)
            finish(response)
            return body


def digest_field(sha256: bytes | None) -> dict[str, str]:
    """Return the field that tells a body's digest (RFC 9530)."""
    return {_DIGEST: f"sha-256=:{b64encode(sha256).decode()}:"} if sha256 else {}


@contextlib.contextmanager
def _read_to_the_end(response: Response) -> Iterator[None]:
    """Return the connection to the pool after the body was read; close it if it was not."""
    try:
        yield
    except BaseException:
        response.close()
        raise
    response.release_conn()


class _Body:
    """The pieces of a body; ``is_sent`` is true once urllib3 has asked for more than the last."""

    def __init__(self, pieces: Iterable[object]) -> None:
        self._pieces = pieces
        self.is_sent = False

    def __iter__(self) -> Iterator[object]:
        yield from self._pieces
        self.is_sent = True
