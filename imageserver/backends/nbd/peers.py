# SPDX-License-Identifier: Apache-2.0
"""What the kernel knows of an NBD server's connections: those of dead clients, who waits for one.

A worker that is killed leaves its last writes in the server's receive buffer. Until the
server has read to the end and closed its side, they may still land, and could land on top
of a successor's. The kernel knows: the server's end of such a connection has a peer that is
gone (inode 0) and is shut down both ways (sock_diag(7), struct unix_diag_msg).

A server with no room for another client leaves it in its listening socket's queue.
"""

import contextlib
import os
import socket
import struct
from collections.abc import Collection, Iterator

from imageserver.core.transfer import path_bytes

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_DUMP_REQUEST = 0x301  # NLM_F_REQUEST | NLM_F_DUMP
_ESTABLISHED, _LISTEN = 1 << 1, 1 << 10
_SHOW_NAME_VFS_PEER = 0b111
_SHOW_VFS_QUEUE = 0b10010
_NAME, _VFS, _PEER, _QUEUE = 0, 1, 2, 4

_HEADER = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBHIIIII")
_MESSAGE_SIZE = 16
_ATTRIBUTE = struct.Struct("=HH")
#: Two attributes of a socket that listens: its file; how many wait, and may wait, to be accepted.
_LISTENING = struct.Struct("=HH8sHHII")
_MINOR_BITS = 20  # the kernel's own dev_t, as unix_diag shows it


def has_orphans(path: str, at: bytes | None = None) -> bool:
    """Tell whether the server listening at ``path`` still holds connections of dead clients.

    ``at``: the path without links, where they have been resolved.

    False where that cannot be known, because the server lives in another network namespace.

    Raises:
        OSError: there is no socket now, but it may have been moved away for a moment; or the
            kernel does not answer.
    """
    names = {path_bytes(path), at}
    found = os.stat(at or path_bytes(path))
    file = _file(found.st_dev, found.st_ino)
    return any(
        attributes.get(_PEER) == bytes(4)
        and (attributes.get(_VFS) == file or attributes.get(_NAME, b"").rstrip(b"\0") in names)
        for attributes in map(_attributes, _sockets(_ESTABLISHED, _SHOW_NAME_VFS_PEER))
    )


def require_sock_diag() -> None:
    """Prove that the kernel tells of Unix sockets.

    Raises:
        OSError: it does not: AF_NETLINK is forbidden, or the kernel lacks it.
    """
    for _ in _sockets(_LISTEN, 0):
        pass


def crowded(servers: Collection[tuple[int, ...]]) -> set[tuple[int, ...]]:
    """Return at which of some listening sockets clients wait to be let in.

    ``servers``: device, inode and more of each (``NbdImage.stamp``). One whose queue the kernel
    does not show, as in another network namespace, counts as not crowded.
    """
    files = {_file(*server[:2]): server for server in servers if server}
    found = set()
    with contextlib.suppress(OSError):
        for data in _sockets(_LISTEN, _SHOW_VFS_QUEUE) if files else ():
            # Those bound to a path begin with both attributes: see sk_diag_fill() of the kernel.
            if len(data) >= _LISTENING.size:
                _, _, file, _, kind, waiting, _ = _LISTENING.unpack_from(data)
                if waiting and kind == _QUEUE and file in files:
                    found.add(files[file])
    return found


def _file(device: int, inode: int) -> bytes:
    """Return a socket's file as unix_diag shows it (struct unix_diag_vfs)."""
    number = os.major(device) << _MINOR_BITS | os.minor(device)
    return struct.pack("=II", inode & 0xFFFFFFFF, number)


def _sockets(states: int, show: int) -> Iterator[bytes]:
    """Yield the attributes of every Unix socket of this network namespace in such a state."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as netlink:
        netlink.settimeout(1.0)
        request = _REQUEST.pack(socket.AF_UNIX, 0, 0, states, 0, show, 0xFFFFFFFF, 0xFFFFFFFF)
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
                yield data[at + _HEADER.size + _MESSAGE_SIZE : at + length]
                at += (length + 3) & ~3


def _attributes(data: bytes) -> dict[int, bytes]:
    attributes = {}
    at = 0
    while at < len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        attributes[kind] = data[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3
    return attributes
