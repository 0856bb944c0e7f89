# SPDX-License-Identifier: Apache-2.0
"""The proofs: what the server promises, under every fault of a kind in turn (``scripts/prove``).

calls      each call of the C library that an operation on files makes fails once
exports    each NBD request fails once, and each call of libnbd
world      a server in one process, but for its sockets; what it has left behind
nth        an nbdkit plugin whose Nth request fails

What cannot fail once more by itself is in ``lab.faults``: a library that is preloaded.
"""
