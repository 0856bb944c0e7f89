# SPDX-License-Identifier: Apache-2.0
"""Requests to one server through urllib3's connection pool; its errors become ``failures``.

Each request is made once; ``backoff`` retries. An answer is returned only with an expected status.
"""

import contextlib
import http.client
import re
import ssl
from collections.abc import Iterable, Iterator, Mapping
from urllib.parse import urlsplit

import urllib3
from urllib3 import exceptions

from imageserver.client.failures import Broken, Busy, Failed, GaveUp, Refused, Unreachable
from imageserver.client.http.access import Access, tls_reason
from imageserver.client.http.answers import parse_fields
from imageserver.client.http.connections import NoTls, Sockets, is_protocol_error, make_pool
from imageserver.client.pace import LONGEST_WORK

#: Statuses that a retry may change (502 and 504: a proxy whose server restarts).
_TRANSIENT = {408, 409, 425, 429, 502, 503, 504}
_GIVEN_UP = {502, 504}
#: Longest error message of a server that is read, in bytes.
_MAX_MESSAGE = 4096
#: Longest part of it that is shown, in characters.
_MAX_SHOWN = 300
#: Longest rest of a body that is read so that the connection can be used again, in bytes.
_MAX_REST = 64 * 1024
_BELOW_ERRORS = 300
#: http.client's errors for an answer that is no HTTP.
_NO_HTTP = (http.client.UnknownProtocol, http.client.LineTooLong, http.client.BadStatusLine)
_SECONDS = re.compile(r"[0-9]{1,6}")

Response = urllib3.BaseHTTPResponse


class Transport:
    """Requests to one server; its methods may be called by several threads at once."""

    def __init__(self, access: Access, connections: int = 8) -> None:
        parts = urlsplit(access.url)
        self.target = parts.path or "/"
        #: The server's name in messages.
        self.name = access.unix_socket or parts.netloc
        self._fields = {"Host": access.host_field, "User-Agent": "imagectl"} | access.fields
        self._seconds = access.timeout_seconds
        #: Nothing has come from a port that may expect TLS, of which we speak none.
        self._may_be_tls = parts.scheme == "http" and not access.unix_socket
        self._sockets = Sockets()
        self._pool = make_pool(access, connections, self._sockets)

    def request(  # noqa: PLR0913 - what one request has
        self,
        method: str,
        target: str,
        *,
        expected: Iterable[int] = (200,),
        headers: Mapping[str, str] | None = None,
        body: bytes | Iterable[object] | None = None,
        silent_seconds: float | None = None,
    ) -> Response:
        """Make a request; return the answer, its body unread.

        ``silent_seconds``: how long it may take to begin, if not as long as all other answers.

        Raises:
            Transient: it may succeed if made again.
            Refused, Failed: it will not.
        """
        with self.translated():
            response = self._pool.urlopen(
                method,
                target,
                body=body,  # type: ignore[arg-type] # pieces for `send`, which takes any buffer
                headers={
                    **self._fields,
                    "Accept-Encoding": "identity",
                    **(headers or {}),
                },
                retries=False,
                redirect=False,
                assert_same_host=False,
                preload_content=False,
                timeout=self._timeout(silent_seconds),
            )
            self._may_be_tls = False
            if response.status in expected:
                return response
            raise self._refusal(method, response)

    def _timeout(self, silent_seconds: float | None) -> urllib3.Timeout:
        usual = self._seconds
        return urllib3.Timeout(connect=usual, read=max(usual, silent_seconds or 0.0))

    def read_into(self, response: Response, view: memoryview) -> int:
        """Read some of a body into ``view``; return how many bytes.

        Raises:
            Broken: the body has ended.
        """
        with self.translated():
            count = self._sockets.reply(response).read_into(view)
        if not count:
            raise Broken(f"the answer of {self.name} was cut")
        return count

    def allow_blanks(self, response: Response, seconds: float = LONGEST_WORK) -> None:
        """Let blanks in an answer count as progress for so long: the server is at work."""
        self._sockets.reply(response).pace.blanks_seconds = seconds

    @contextlib.contextmanager
    def translated(self) -> Iterator[None]:
        """Turn urllib3's errors into ``failures``."""
        try:
            yield
        except (exceptions.NewConnectionError, exceptions.ConnectTimeoutError) as exc:
            raise Unreachable(f"cannot connect to {self.name}: {_reason(exc)}") from exc
        except NoTls as exc:
            raise self._without_tls(exc) from exc
        except (exceptions.SSLError, ssl.SSLError) as exc:
            if "ALERT" in str(exc).upper():  # TLS 1.3 may send one after the handshake
                raise Failed(f"no TLS with {self.name}: {_reason(exc)}") from exc
            raise Broken(f"the TLS connection to {self.name} broke: {_reason(exc)}") from exc
        except (exceptions.ReadTimeoutError, TimeoutError) as exc:
            raise Broken(f"{self.name} was silent for too long") from exc
        except (exceptions.HTTPError, OSError) as exc:
            if _is_no_http(_innermost(exc)):
                raise Failed(f"{self.name} does not speak HTTP: {_reason(exc)}") from exc
            raise self._broken(exc) from exc

    def _broken(self, exc: BaseException) -> Broken:
        sentence = f"the connection to {self.name} broke: {_reason(exc)}"
        if self._may_be_tls and isinstance(_innermost(exc), ConnectionError):
            sentence += " (does this port speak TLS? then say https://)"
        return Broken(sentence)

    def _without_tls(self, exc: NoTls) -> Exception:
        """Return the failure for a handshake that failed: one that was cut may succeed later."""
        inner = _innermost(exc)
        if isinstance(inner, TimeoutError):
            return Unreachable(f"{self.name} does not answer in TLS")
        kind = Failed if is_protocol_error(inner) else Unreachable
        return kind(f"no TLS with {self.name}: {_reason(exc)}")

    def _refusal(self, method: str, response: Response) -> Exception:
        if response.status < _BELOW_ERRORS:  # its body may be the image: do not show it
            response.close()
            return Refused(
                f"{self.name} answered {method} with {response.status}, which was not asked for",
                response.status,
            )
        sentence = f"{self.name} answered {method} with {response.status}: {_message(response)}"
        if response.status in _TRANSIENT:
            wait = response.headers.get("Retry-After", "")
            kind = GaveUp if response.status in _GIVEN_UP else Busy
            return kind(sentence, float(wait) if _SECONDS.fullmatch(wait) else None)
        if response.status >= 500 and response.status != 501:  # noqa: PLR2004 - RFC 9110
            return Failed(sentence)
        return Refused(sentence, response.status)

    def cut(self) -> None:
        """End all connections: threads that wait for one get ``Broken``."""
        self._sockets.cut()

    def close(self) -> None:
        """Close all idle connections."""
        self._pool.close()


def finish(response: Response) -> None:
    """Release the connection of an answer: for use if little is left of the body, else closed."""
    left = getattr(response, "length_remaining", None)
    if left is None or left > _MAX_REST:
        response.close()
    else:
        response.drain_conn()
        response.release_conn()


def _message(response: Response) -> str:
    """Return the message in an error's body: in JSON, or the first line of text."""
    try:
        text = response.read(_MAX_MESSAGE)
        finish(response)
    except (exceptions.HTTPError, OSError):
        response.close()
        return response.reason or "an answer that was cut"
    if fields := parse_fields(text):
        return str(fields.get("error") or fields.get("explanation") or fields)[:_MAX_SHOWN]
    first = text.decode("utf-8", "replace").strip().partition("\n")[0]
    return first[:_MAX_SHOWN] or response.reason or "no reason"


def _is_no_http(exc: BaseException) -> bool:
    return isinstance(exc, _NO_HTTP) and not isinstance(exc, http.client.RemoteDisconnected)


def _innermost(exc: BaseException) -> BaseException:
    """Return the error inside of urllib3's wrappers."""
    while True:
        inner = next((a for a in exc.args if isinstance(a, BaseException)), None) or exc.__cause__
        if inner is None:
            return exc
        exc = inner


def _reason(exc: BaseException) -> str:
    """Return the message of the innermost error."""
    exc = _innermost(exc)
    if isinstance(exc, OSError) and exc.strerror:
        return tls_reason(exc)
    words = str(exc).rpartition("Failed to establish a new connection: ")[2]
    return words[:_MAX_SHOWN] or type(exc).__name__
