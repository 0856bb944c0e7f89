# SPDX-License-Identifier: Apache-2.0
"""What the tests share with ``scripts/bench``, ``load``, ``soak``, ``prove`` and ``capture``.

processes  programs: found, started, waited for, ended; ports
servers    the image server, qemu-nbd, nbdkit; qemu-img and qemu-io
ovirt      oVirt's own daemon
wire       an HTTP client on a bare socket
faults     a call of the C library that fails
wan        a link with a delay and a loss
model      which bytes an image may contain, and which extents
remains    what a server must not hold at the end, nor its log have

Nothing here knows who uses it. Of ``imageserver`` it imports the slot table, which tells who
holds a slot; whatever else is known of the server was asked over its sockets.
"""
