# SPDX-License-Identifier: Apache-2.0
"""The soak: a seeded storm against a real server, and a model that knows every byte.

    clients --HTTP--> imageserver --NBD--> proxy --NBD--> qemu-nbd
      |                  ^ SIGKILL, SIGHUP    |              ^ killed, stopped, started again
      v                  |                    v              |
    model              chaos            counts, delays     chaos

__main__   arguments, and the verdict
storm      starts everything, lets it run, looks whether all came back
chaos      what dies, when; and which failures of clients that excuses
clients    who reads, writes, surveys and probes
model      what each image may contain
backends   images and the NBD servers that serve them
proxy      what an NBD server sees of us (a process of its own)
remains    what must not be left of it all
wire       HTTP as bytes on a socket

Run as a directory (``scripts/soak``): modules import each other by bare name.
"""
