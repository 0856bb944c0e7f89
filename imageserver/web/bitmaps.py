# SPDX-License-Identifier: Apache-2.0
"""Which dirty bitmap an answer rests on: what a client that asked for changes is told, and the log.

    Image-Dirty-Bitmap: backup0
    Image-Dirty-Bitmap: none          all counts as changed: a full backup

A name is percent-encoded (RFC 8187, section 3.2.1), so whatever it is, it is one word of ASCII.
A bitmap that is called ``none`` is ``%6Eone``.
"""

import logging
from urllib.parse import quote

import falcon

from imageserver.core.entry import fields
from imageserver.core.transfer import Transfer
from imageserver.web.requests import request_of

log = logging.getLogger(__name__)

_HEADER = "Image-Dirty-Bitmap"
_NONE = "none"
#: attr-char of RFC 8187, but for letters, digits and those that ``quote`` leaves alone anyway.
_PLAIN = "!#$&+^`|"


def say_bitmap(
    req: falcon.Request, resp: falcon.Response, transfer: Transfer, bitmap: str | None
) -> None:
    """Name the bitmap in the answer; None: say that there is none, and warn the operator."""
    resp.set_header(_HEADER, header_value(bitmap))
    if bitmap is None:
        told = fields(transfer=transfer.id, request=request_of(req).name, detail=transfer.image)
        log.warning("no dirty bitmap: all counts as dirty", extra=told)


def header_value(bitmap: str | None) -> str:
    """Return what the header says of a bitmap."""
    if bitmap is None:
        return _NONE
    return "%6Eone" if bitmap == _NONE else quote(bitmap, safe=_PLAIN)
