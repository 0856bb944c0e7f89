# SPDX-License-Identifier: Apache-2.0
"""Connections that an NBD server still holds of clients that are gone.

A worker that is killed leaves its last writes in the server's receive buffer. Until the
server has read to the end and closed its side, they may still land, and could land on top
of a successor's. The kernel knows: the server's end of such a connection has a peer that is
gone (inode 0) and is shut down both ways (sock_diag(7), struct unix_diag_msg).
"""

import os
import socket
import struct
from collections.abc import Iterator

from imageserver.core.transfer import path_bytes

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_DUMP_REQUEST = 0x301  # NLM_F_REQUEST | NLM_F_DUMP
_ESTABLISHED = 1 << 1
_SHOW_NAME_VFS_PEER = 0b111
_NAME, _VFS, _PEER = 0, 1, 2

_HEADER = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBHIIIII")
_MESSAGE_SIZE = 16
_ATTRIBUTE = struct.Struct("=HH")
_MINOR_BITS = 20  # the kernel's own dev_t, as unix_diag shows it


def has_orphans(path: str, at: bytes | None = None) -> bool:
    """Tell whether the server listening at ``path`` still holds connections of dead clients.

    ``at``: the path without links, where they have been resolved.

    False where that cannot be known, because the server lives in another network namespace.

    Raises:
        OSError: the kernel does not answer.
    """
    name = path_bytes(path)
    try:
        found = os.stat(at or name)
    except OSError:
        return False  # nobody listens there any more
    device = os.major(found.st_dev) << _MINOR_BITS | os.minor(found.st_dev)
    file = struct.pack("=II", found.st_ino & 0xFFFFFFFF, device)
    return any(
        attributes.get(_PEER) == bytes(4)
        and (attributes.get(_VFS) == file or attributes.get(_NAME, b"").rstrip(b"\0") == name)
        for attributes in _established()
    )


def _established() -> Iterator[dict[int, bytes]]:
    """Yield the attributes of every connected Unix socket of this network namespace."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as netlink:
        netlink.settimeout(1.0)
        request = _REQUEST.pack(
            socket.AF_UNIX, 0, 0, _ESTABLISHED, 0, _SHOW_NAME_VFS_PEER, 0xFFFFFFFF, 0xFFFFFFFF
        )
        size = _HEADER.size + len(request)
        netlink.send(_HEADER.pack(size, _SOCK_DIAG_BY_FAMILY, _DUMP_REQUEST, 1, 0) + request)
        while True:
            data = netlink.recv(1 << 17)
            at = 0
            while at < len(data):
                length, kind, *_ = _HEADER.unpack_from(data, at)
                if kind == _NLMSG_DONE:
                    return
                if kind == _NLMSG_ERROR:
                    raise OSError(
                        -struct.unpack_from("=i", data, at + _HEADER.size)[0], "sock_diag"
                    )
                yield _attributes(data[at + _HEADER.size + _MESSAGE_SIZE : at + length])
                at += (length + 3) & ~3


def _attributes(data: bytes) -> dict[int, bytes]:
    attributes = {}
    at = 0
    while at < len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        attributes[kind] = data[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3
    return attributes
