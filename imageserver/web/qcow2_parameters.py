# SPDX-License-Identifier: Apache-2.0
"""What ``GET /images/{id}`` is asked for with ``format=qcow2``, parsed and checked.

format=qcow2 [cluster_size=N] [context=dirty [backing=NAME backing_format=F]]
"""

from dataclasses import dataclass

import falcon

from imageserver.core.errors import BadRequest
from imageserver.core.qcow2_layout import MAX_BACKING_NAME, MAX_CLUSTER_SIZE, MIN_CLUSTER_SIZE
from imageserver.core.ranges import parse_position

_FORMATS = ("raw", "qcow2")
_CONTEXTS = ("zero", "dirty")
#: What only a qcow2 file has; ``context`` is one of the extents', too.
_OF_QCOW2 = ("cluster_size", "context", "backing", "backing_format")


@dataclass(frozen=True, slots=True)
class Qcow2Wanted:
    """The file that a client wants."""

    cluster_size: int | None
    """In bytes; None: the server chooses."""
    dirty: bool
    """Only what is dirty; all where no bitmap tells."""
    backing: str | None
    backing_format: str | None


def read_qcow2(req: falcon.Request) -> Qcow2Wanted | None:
    """Return what qcow2 file a request is for; None: it is for the image itself.

    Raises:
        BadRequest: a value is wrong, or one stands there without what gives it a meaning.
    """
    kind = _one_of(req, "format", _FORMATS)
    if kind != "qcow2":
        for name in _OF_QCOW2:
            if req.has_param(name):
                raise BadRequest(f'"{name}" goes with format=qcow2')
        return None
    cluster_size = _read_cluster_size(req)
    dirty = _one_of(req, "context", _CONTEXTS) == "dirty"
    backing, backing_format = _read_backing(req), _one_of(req, "backing_format", _FORMATS)
    if (backing is None) != (backing_format is None):
        raise BadRequest('"backing" and "backing_format" go together')
    if backing is not None and not dirty:
        raise BadRequest('"backing" goes with context=dirty: a full image has no backing file')
    return Qcow2Wanted(cluster_size, dirty, backing, backing_format)


def _single(req: falcon.Request, name: str) -> str | None:
    values = req.get_param_as_list(name)
    if values is None:
        return None
    if len(values) != 1:
        raise BadRequest(f'invalid "{name}": there must be one')
    value: str = values[0]
    return value


def _one_of(req: falcon.Request, name: str, allowed: tuple[str, ...]) -> str | None:
    value = _single(req, name)
    if value is not None and value not in allowed:
        raise BadRequest(f'invalid "{name}": it must be {" or ".join(allowed)}')
    return value


def _read_cluster_size(req: falcon.Request) -> int | None:
    text = _single(req, "cluster_size")
    if text is None:
        return None
    size = parse_position(text) or 0
    if not MIN_CLUSTER_SIZE <= size <= MAX_CLUSTER_SIZE or size & (size - 1):
        raise BadRequest(
            'invalid "cluster_size": it must be a power of two '
            f"from {MIN_CLUSTER_SIZE} to {MAX_CLUSTER_SIZE}"
        )
    return size


def _read_backing(req: falcon.Request) -> str | None:
    name = _single(req, "backing")
    if name is None:
        return None
    # A name that was no UTF-8 comes with surrogates, or replaced.
    is_text = "\N{REPLACEMENT CHARACTER}" not in name and name.isprintable()
    if not (name and is_text and len(name.encode(errors="replace")) <= MAX_BACKING_NAME):
        raise BadRequest(
            f'invalid "backing": it must be 1 to {MAX_BACKING_NAME} bytes of printable UTF-8'
        )
    return name
