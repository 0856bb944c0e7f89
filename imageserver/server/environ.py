# SPDX-License-Identifier: Apache-2.0
"""The WSGI environment of a request (PEP 3333), made of its parsed head and its connection.

As gunicorn's, but without ``wsgi.early_hints``; and what is the same for every request of the
process, or of a connection, is looked up once. ``SCRIPT_NAME`` is the process's variable, as with
gunicorn, and no header's.
"""

import os
from collections.abc import Iterable
from typing import Any

from gunicorn.config import Config
from gunicorn.http.errors import ConfigurationProblem
from gunicorn.http.wsgi import base_environ, proxy_environ
from gunicorn.util import unquote_to_wsgi_str

from imageserver.server.commonhead import CommonHead, key
from imageserver.server.connection import Connection
from imageserver.server.request import HeadRules, ImageRequest

_PORTS = {"http": "80", "https": "443"}


class Gateway:
    """What gunicorn's configuration says of every request."""

    def __init__(self, cfg: Config) -> None:
        self.rules = HeadRules(cfg)
        self._script_name = os.environ.get("SCRIPT_NAME", "")
        more = {"wsgi.multithread": True, "SCRIPT_NAME": self._script_name}
        self._common = {**base_environ(cfg), **more}

    def environ(self, req: CommonHead | ImageRequest, conn: Connection) -> dict[str, Any]:
        """Return a request's environment, which has no ``wsgi.input`` yet.

        Raises:
            ConfigurationProblem: the path does not begin with ``SCRIPT_NAME``.
        """
        path, script_name = req.path, self._script_name
        if not path.startswith(script_name):
            raise ConfigurationProblem(f"{path!r} does not begin with {script_name!r}")
        if conn.environ is None:
            conn.environ = {**self._common, "gunicorn.socket": conn.sock, **_addresses(conn)}
        environ = conn.environ.copy()
        environ["REQUEST_METHOD"] = req.method
        environ["QUERY_STRING"] = req.query
        environ["RAW_URI"] = req.uri
        environ["SERVER_PROTOCOL"] = "HTTP/1.1" if req.version == (1, 1) else "HTTP/1.0"
        path = path[len(script_name) :]
        environ["PATH_INFO"] = unquote_to_wsgi_str(path) if "%" in path else path
        # gunicorn knows of no TLS here.
        environ["wsgi.url_scheme"] = scheme = "https" if conn.is_tls else req.scheme
        if req.fields is None:
            _add_fields(environ, req.headers)
        else:
            environ.update(req.fields)
        if "SERVER_NAME" not in environ:
            _name_server(environ, conn.listener, scheme)
        if req.proxy_protocol_info:
            environ.update(proxy_environ(req))
        return environ


def _add_fields(environ: dict[str, Any], fields: Iterable[tuple[str, str]]) -> None:
    # Joined at the end: one by one, the growing value would be copied each time.
    repeated: dict[str, list[str]] = {}
    for name, value in fields:
        at = key(name)
        if at in environ:
            repeated.setdefault(at, [environ[at]]).append(value)
        else:
            environ[at] = value
    for at, values in repeated.items():
        environ[at] = ",".join(values)


def _addresses(conn: Connection) -> dict[str, str]:
    """Return a connection's own part: who is at its ends, as far as it tells."""
    peer, listener = conn.address, conn.listener
    if isinstance(peer, tuple):
        found = {"REMOTE_ADDR": peer[0], "REMOTE_PORT": str(peer[1])}
    else:
        found = {"REMOTE_ADDR": str(peer)}
    if isinstance(listener, tuple):
        found |= {"SERVER_NAME": listener[0], "SERVER_PORT": str(listener[1])}
    return found


def _name_server(environ: dict[str, Any], listener: object, scheme: str) -> None:
    """Name a server at a Unix socket: what the client takes it for."""
    name, _, port = environ.get("HTTP_HOST", "").partition(":")
    environ["SERVER_NAME"] = name or str(listener)
    environ["SERVER_PORT"] = port or (_PORTS[scheme] if name else "")
