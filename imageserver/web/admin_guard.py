# SPDX-License-Identifier: Apache-2.0
"""Which requests of a browser the admin listener answers: none that another web site has made.

A browser lets any site send a request here, from inside the network, and two things keep that site
from the answer. It is not told to let others read it (there are no CORS headers); and by
``Sec-Fetch-Site`` or ``Origin`` it is refused before anything is looked up. Against a site whose
name leads to this very address (DNS rebinding), to which all of this looks like its own, ``Host``
is checked: an address is nobody's name, and of names only ours are answered.

A link to the page itself may be anywhere: to follow it tells the other site nothing.
"""

import ipaddress
import re
from collections.abc import Collection

import falcon

from imageserver.web.answers import set_json

_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^:\[\]@/]+))(?::[0-9]{0,5})?", re.IGNORECASE)
#: RFC 6761: both always lead to the loopback interface.
_LOCAL, _LOCAL_DOMAIN = "localhost", ".localhost"
_OWN_SITES = ("same-origin", "none")  # none: typed in, or a bookmark
_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class AdminGuard:
    """Refuses what comes from other sites; says in each answer that it is for nobody else."""

    def __init__(self, hosts: Collection[str] | None) -> None:
        """``hosts``: names under which the listener may be asked, None: any (a Unix socket)."""
        self._hosts = None if hosts is None else frozenset(name.lower() for name in hosts)

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer in place of the resource, where it is not for this one."""
        host: str | None = req.env.get("HTTP_HOST")
        if self._hosts is not None and host and not knows(host, self._hosts):
            _refuse(resp, 421, "unknown host")
        elif is_foreign(req):
            _refuse(resp, 403, "cross-origin request")

    def process_response(
        self,
        _req: falcon.Request,
        resp: falcon.Response,
        _resource: object,
        _req_succeeded: bool,  # noqa: FBT001 - Falcon's signature
    ) -> None:
        """Add what keeps other sites, caches and guesses away."""
        resp.set_headers(_HEADERS)


def knows(host: str, names: Collection[str]) -> bool:
    """Tell whether a ``Host`` is an IP address, the loopback interface's name or one of these."""
    match = _HOST.fullmatch(host)
    if match is None:
        return False
    name = (match[1] or match[2]).lower().removesuffix(".")
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name == _LOCAL or name.endswith(_LOCAL_DOMAIN) or name in names
    return True


def is_foreign(req: falcon.Request) -> bool:
    """Tell whether another web site has made a request, by what its browser says of it."""
    env = req.env
    origin: str | None = env.get("HTTP_ORIGIN")
    if (
        origin is not None
        and origin.partition("://")[2].lower() != env.get("HTTP_HOST", "").lower()
    ):
        return True
    site: str = env.get("HTTP_SEC_FETCH_SITE", "none")
    is_link = (env.get("HTTP_SEC_FETCH_MODE"), env.get("HTTP_SEC_FETCH_DEST")) == (
        *("navigate", "document"),
    )
    return site not in _OWN_SITES and not (is_link and req.path == "/")


def _refuse(resp: falcon.Response, status: int, message: str) -> None:
    resp.status = status
    set_json(resp, {"error": message})
    resp.complete = True
