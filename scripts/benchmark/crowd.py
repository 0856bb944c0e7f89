# SPDX-License-Identifier: Apache-2.0
"""Many sockets, held by processes of their own until standard input ends.

    crowd.py unix COUNT     connected Unix sockets that nobody uses
    crowd.py PORT COUNT     connections that have made a request, and make no more

Prints ``ready`` when there are so many.
"""

import os
import socket
import sys

_EACH = 500  # a process's limit is 1024 where nobody has raised it
_PROBE = b"OPTIONS /images/* HTTP/1.1\r\nHost: bench\r\n\r\n"


def _held(where: str) -> tuple[socket.socket, ...]:
    if where == "unix":
        return socket.socketpair()
    sock = socket.create_connection(("127.0.0.1", int(where)), 60)
    sock.sendall(_PROBE)
    if not sock.recv(65536).startswith(b"HTTP/1.1 200 "):
        sys.exit("crowd.py: no answer")
    return (sock,)


def main(where: str, count: str) -> None:
    """Hold them."""
    left = int(count)
    said, says = os.pipe()
    children = 0
    while left > 0:
        children += 1
        if not os.fork():
            held: list[socket.socket] = []
            while len(held) < min(left, _EACH):
                held += _held(where)
            os.write(says, b".")
            sys.stdin.read()
            os._exit(0)
        left -= _EACH
    os.close(says)
    while children:
        if not (come := os.read(said, children)):
            sys.exit("crowd.py: some could not be opened")
        children -= len(come)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
