# SPDX-License-Identifier: Apache-2.0
"""The proofs: what the server promises, under every fault of a kind in turn (``scripts/prove``).

calls           each call of the C library that an operation on files makes fails once
exports         each NBD request fails once, and each call of libnbd
power           the power fails at any moment; ``lab.powercut`` says what is left
evil            each byte that an NBD server sends is another one, or the last one
parsers         what haproxy passes on is read here as haproxy has read it; odd, the requests
operations      what is done to files, registrations and tables, and what is right afterwards
cached_files    files moved past the page cache, and what a failed call there obliges to
qcow2_streams   an image asked for as a qcow2 file, and which answers are right
sweep           one thing after another fails in an operation
world           a server in one process, but for its sockets; what it has left behind
nth             an nbdkit plugin whose Nth request fails

What cannot fail once more by itself is in ``lab.faults``: a library that is preloaded.
"""
