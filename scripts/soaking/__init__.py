# SPDX-License-Identifier: Apache-2.0
"""The soak: a seeded storm against a real server, and a model that knows every byte.

    clients --HTTP--> imageserver --NBD--> proxy --NBD--> qemu-nbd
      |                  ^ SIGKILL, SIGHUP    |              ^ killed, stopped, started again
      v                  |                    v              |
    model (lab)        chaos            counts, delays     chaos

__main__   arguments, and the verdict (``scripts/soak``)
storm      starts everything, lets it run, checks the end; reloading: without chaos
chaos      what dies, when; and which failures of clients that excuses
healing    what must be to be had when the storm is over
clients    who reads, writes, surveys and probes
backends   images and the NBD servers that serve them
proxy      what an NBD server sees of us (a process of its own)
"""
