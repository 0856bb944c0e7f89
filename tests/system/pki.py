# SPDX-License-Identifier: Apache-2.0
"""Servers that speak TLS, their certificates (scripts/make-pki), and clients that trust them."""

import contextlib
import http.client
import socket
import ssl
import subprocess
import warnings
from pathlib import Path

from tests.system.harness import ROOT, Server

V1_2, V1_3 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3


def make_pki(directory: Path) -> Path:
    """Make a CA with certificates of a server and a client; what is there is kept."""
    command = [str(ROOT / "scripts" / "make-pki"), str(directory)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return directory


def files(pki: Path, *, client_ca: bool = False) -> dict[str, object]:
    """Return the settings of a server with these certificates."""
    paths = {"tls_cert": pki / "server.crt", "tls_key": pki / "server.key"}
    return paths | ({"tls_client_ca": pki / "ca.crt"} if client_ca else {})


def trusting(
    pki: Path, version: ssl.TLSVersion | None = None, own: Path | None = None
) -> ssl.SSLContext:
    """Return a client's context; ``own``: the PKI of its certificate, if it has one.

    It takes an end without a farewell (close_notify) for the cut that it is.
    """
    context = ssl.create_default_context(cafile=pki / "ca.crt")
    context.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF
    if version is not None:
        context.set_ciphers("ALL:@SECLEVEL=0")  # else the client refuses old versions itself
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            context.minimum_version = context.maximum_version = version
    if own is not None:
        context.load_cert_chain(own / "client.crt", own / "client.key")
    return context


class TlsServer(Server):
    """A server whose TCP address speaks TLS, and clients that do, too."""

    def __init__(self, directory: Path, pki: Path, **settings: object) -> None:
        super().__init__(directory, **files(pki) | settings)
        self.context = trusting(pki)

    def connect(self, timeout: float = 30) -> http.client.HTTPConnection:
        return http.client.HTTPSConnection(
            "localhost", self.port, timeout=timeout, context=self.context
        )

    def raw(self, data: bytes = b"", timeout: float = 30) -> ssl.SSLSocket:
        return self.greet(self.context, data, timeout)

    def plain(self, data: bytes = b"", timeout: float = 30) -> socket.socket:
        """Open a connection that has not said anything of TLS."""
        return super().raw(data, timeout)

    def greet(
        self,
        context: ssl.SSLContext,
        data: bytes = b"",
        timeout: float = 30,
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLSocket:
        """Open a TLS connection and send ``data``."""
        with contextlib.ExitStack() as stack:
            below = stack.enter_context(self.plain(timeout=timeout))
            sock = context.wrap_socket(
                below, server_hostname="localhost", suppress_ragged_eofs=False, session=session
            )
            sock.sendall(data)
            stack.pop_all()
        return sock
