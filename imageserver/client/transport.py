# SPDX-License-Identifier: Apache-2.0
"""HTTP to one server through urllib3's connection pool: over TCP, TLS, or a Unix socket.

One request is tried once: who retries is ``backoff``. urllib3's errors become ours here and
in ``translated``, and its answers leave only with a status that was asked for.
"""

import contextlib
import json
import re
import ssl
from collections.abc import Iterable, Iterator, Mapping
from urllib.parse import urlsplit

import urllib3
from urllib3 import exceptions

from imageserver.client.access import Access, tls_reason
from imageserver.client.connections import Reply, Sockets, make_pool
from imageserver.client.errors import (
    Broken,
    Busy,
    Failed,
    Refused,
    Unreachable,
)

#: Asked again later, these may be answered otherwise (502 and 504: a proxy before a restart).
_TRANSIENT = {408, 409, 425, 429, 502, 503, 504}
#: Longest message of a server that is shown, in bytes.
_MAX_MESSAGE = 4096
#: Longest part of it that is shown, in characters: a sentence.
_MAX_SHOWN = 300
#: Longest rest of a body that is read only to use the connection again.
_MAX_REST = 64 * 1024
_BELOW_ERRORS = 300
_SECONDS = re.compile(r"[0-9]{1,6}")

Response = urllib3.BaseHTTPResponse


class Transport:
    """Requests to one server; its methods may be called by several threads at once."""

    def __init__(self, access: Access, connections: int = 8) -> None:
        parts = urlsplit(access.url)
        self.target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        #: How the server is called in messages.
        self.name = access.unix_socket or parts.netloc
        self._sockets = Sockets()
        self._pool = make_pool(access, connections, self._sockets)

    def request(
        self,
        method: str,
        target: str,
        *,
        expected: Iterable[int] = (200,),
        headers: Mapping[str, str] | None = None,
        body: bytes | Iterable[object] | None = None,
    ) -> Response:
        """Make a request; return the answer, its body unread.

        Raises:
            Transient: it may succeed if made again.
            Refused, Failed: it will not.
        """
        with self.translated():
            response = self._pool.urlopen(
                method,
                target,
                body=body,  # type: ignore[arg-type] # pieces for `send`, which takes any buffer
                headers={"User-Agent": "imagectl", "Accept-Encoding": "identity"}
                | dict(headers or {}),
                retries=False,
                redirect=False,
                assert_same_host=False,
                preload_content=False,
            )
            if response.status in expected:
                return response
            raise self._refusal(method, response)

    def read_into(self, response: Response, view: memoryview) -> int:
        """Fill some of ``view`` with what has come of a body that is longer.

        Raises:
            Broken: it has ended.
        """
        with self.translated():
            reply: Reply = response._fp  # type: ignore[attr-defined] # noqa: SLF001
            count = reply.read_into(view)
        if not count:
            raise Broken(f"the answer of {self.name} was cut")
        return count

    @contextlib.contextmanager
    def translated(self) -> Iterator[None]:
        """Turn urllib3's errors into ours."""
        try:
            yield
        except (exceptions.NewConnectionError, exceptions.ConnectTimeoutError) as exc:
            raise Unreachable(f"cannot connect to {self.name}: {_reason(exc)}") from exc
        except (exceptions.SSLError, ssl.SSLError) as exc:
            if "CERTIFICATE" in str(exc).upper() or "WRONG_VERSION" in str(exc).upper():
                raise Failed(f"no TLS with {self.name}: {_reason(exc)}") from exc
            raise Broken(f"the TLS connection to {self.name} broke: {_reason(exc)}") from exc
        except (exceptions.ReadTimeoutError, TimeoutError) as exc:
            if "handshake" in str(exc.__cause__):
                raise Broken(f"{self.name} does not answer in TLS") from exc
            raise Broken(f"{self.name} was silent for too long") from exc
        except (exceptions.HTTPError, OSError) as exc:
            raise Broken(f"the connection to {self.name} broke: {_reason(exc)}") from exc

    def _refusal(self, method: str, response: Response) -> Exception:
        if response.status < _BELOW_ERRORS:  # its body may be the image: none of it is told
            response.close()
            return Refused(
                f"{self.name} answered {method} with {response.status}, which was not asked for",
                response.status,
            )
        sentence = f"{self.name} answered {method} with {response.status}: {_message(response)}"
        if response.status in _TRANSIENT:
            wait = response.headers.get("Retry-After", "")
            return Busy(sentence, float(wait) if _SECONDS.fullmatch(wait) else None)
        if response.status >= 500 and response.status != 501:  # noqa: PLR2004 - RFC 9110
            return Failed(sentence)
        return Refused(sentence, response.status)

    def finish(self, response: Response) -> None:
        """Be done with an answer: its connection is used again if little is left of the body."""
        _finish(response)

    def cut(self) -> None:
        """End all connections: threads that wait for one get ``Broken``."""
        self._sockets.cut()

    def close(self) -> None:
        """Close all idle connections."""
        self._pool.close()


def _finish(response: Response) -> None:
    left = getattr(response, "length_remaining", None)
    if left is None or left > _MAX_REST:
        response.close()
    else:
        response.drain_conn()
        response.release_conn()


def _message(response: Response) -> str:
    """Return what an error's body says: our server's JSON, or another's text."""
    try:
        text = response.read(_MAX_MESSAGE)
        _finish(response)
    except (exceptions.HTTPError, OSError):
        response.close()
        return response.reason or "an answer that was cut"
    try:
        fields = json.loads(text)
        if isinstance(fields, dict):
            said = str(fields.get("error") or fields.get("explanation") or fields)
            return said[:_MAX_SHOWN]
    except (ValueError, RecursionError):
        pass
    first = text.decode("utf-8", "replace").strip().partition("\n")[0]
    return first[:_MAX_SHOWN] or response.reason or "no reason"


def _reason(exc: BaseException) -> str:
    """Return the innermost error's words, without urllib3's wrappings."""
    while True:
        inner = next((a for a in exc.args if isinstance(a, BaseException)), None) or exc.__cause__
        if inner is None:
            break
        exc = inner
    if isinstance(exc, OSError) and exc.strerror:
        return tls_reason(exc)
    return str(exc).rpartition("Failed to establish a new connection: ")[2] or type(exc).__name__
