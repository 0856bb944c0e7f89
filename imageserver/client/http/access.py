# SPDX-License-Identifier: Apache-2.0
"""How a server is reached: URL, certificates, Unix socket, timeout."""

import ipaddress
import re
import ssl
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from imageserver.client.failures import BadUrl, LocalFailure

#: A host's name or address: no blanks, control characters, or delimiters of a URL.
_HOST = re.compile(r"[^\s\x00-\x20\x7f\\<>\"^`{|}]+")
#: The ends of ``[SSL: NO_SUCH] no such thing (_ssl.c:42)``.
_OPENSSL = re.compile(r"^\[[^]]*\] | \(_ssl\.c:[0-9]+\)$")


@dataclass(frozen=True, slots=True)
class Access:
    """How to reach a URL; ``unix_socket`` may begin with ``@`` or NUL (abstract)."""

    url: str
    cacert: str | None = None
    cert: str | None = None
    key: str | None = None
    unix_socket: str | None = None
    timeout_seconds: float = 60.0
    token: str | None = field(default=None, repr=False)
    """What every request shows; redirections, to which it would go along, are not followed."""

    @property
    def fields(self) -> dict[str, str]:
        """The header fields that every request has."""
        return {"Authorization": f"Bearer {self.token}"} if self.token else {}

    @property
    def host(self) -> str:
        """The host's name or address; an IPv6 zone without the URL's ``25`` (RFC 6874)."""
        address, percent, zone = str(urlsplit(self.url).hostname).partition("%")
        return address + percent + zone.removeprefix("25")

    @property
    def host_field(self) -> str:
        """The ``Host`` field; without an IPv6 zone, which means nothing to the server."""
        return re.sub(r"%[^\]]*(?=\])", "", urlsplit(self.url).netloc)

    @property
    def unix_address(self) -> str | None:
        """The Unix socket's address as the system takes it; None: there is none."""
        path = self.unix_socket
        return "\0" + path[1:] if path and path.startswith("@") else path or None

    @property
    def is_local(self) -> bool:
        """Whether the server runs on this machine, as far as the URL tells."""
        return bool(self.unix_socket) or _is_loopback(self.host)

    def __post_init__(self) -> None:
        """Refuse a URL that cannot be requested; drop its user and password, which are not used.

        Raises:
            BadUrl: it cannot, or not in TLS, for which there are options.
        """
        object.__setattr__(self, "url", _checked(self.url))
        if self.url.startswith("http:") and (self.cacert or self.cert or self.key):
            raise BadUrl(
                f"--cacert, --cert and --key are for https:// URLs, and {self.url} is none"
            )


def _checked(url: str) -> str:
    """Return a URL without user and password."""
    masked = re.sub("//[^/]*@", "//", url)
    wrong = BadUrl(f"{masked!r} is no URL: its host or port is wrong")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        host.encode("idna")
    except ValueError as exc:  # of which UnicodeError is one
        raise wrong from exc
    if parts.scheme not in {"http", "https"} or not host:
        raise BadUrl(f"{masked!r} is no http:// or https:// URL")
    if port == 0 or not _HOST.fullmatch(host):
        raise wrong
    if parts.query or parts.fragment:
        bare = re.split("[?#]", masked)[0]
        raise BadUrl(
            f"{bare!r} is followed by a query or fragment: leave it out; options say what is "
            "wanted (download --format qcow2, map --context dirty)"
        )
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def tls_context(access: Access) -> ssl.SSLContext:
    """Return the context that checks the server's certificate and presents ours."""
    try:
        context = ssl.create_default_context(cafile=access.cacert)
    except OSError as exc:  # of which ssl.SSLError is one
        raise LocalFailure(f"cannot use the CA in {access.cacert}: {tls_reason(exc)}") from exc
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if access.cert:
        try:
            context.load_cert_chain(access.cert, access.key)
        except OSError as exc:
            files = f"{access.cert}, its key in {access.key or 'the same file'}"
            raise LocalFailure(f"cannot use the certificate in {files}: {tls_reason(exc)}") from exc
    return context


def tls_reason(exc: OSError) -> str:
    """Return an error's message without OpenSSL's and Python's internal names."""
    return _OPENSSL.sub("", exc.strerror or str(exc))
