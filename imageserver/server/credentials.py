# SPDX-License-Identifier: Apache-2.0
"""Who is at the other end of a Unix socket, as the kernel noted when it connected (unix(7))."""

import socket
import struct

from imageserver.core.control_protocol import Peer

#: struct ucred: pid, uid, gid.
_UCRED = struct.Struct("=iII")
#: asm-generic/socket.h; as many groups as ``socket.getsockopt`` has room for.
_SO_PEERGROUPS = 59
_GROUPS_SIZE = 1024


def peer_of(sock: socket.socket) -> Peer:
    """Return the user and the groups of a connected Unix socket's peer.

    Raises:
        OSError: the kernel does not tell.
    """
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    _, uid, gid = _UCRED.unpack(credentials)
    try:
        groups = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_SIZE)
    except OSError:  # more groups than fit: the first one must do
        groups = b""
    return Peer(uid, frozenset({gid, *struct.unpack(f"={len(groups) // 4}I", groups)}))
