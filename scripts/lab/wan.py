# SPDX-License-Identifier: Apache-2.0
"""A link with a delay, a loss and a rate, in a network namespace: the kernel's own TCP over it.

    process --- 10.99.0.1 [tun] relay: wait, drop --- swap both addresses --- [tun] 10.99.0.1

A packet for 10.99.0.2 comes back, later, as one from there: so who connects to 10.99.0.2 reaches
a server at 10.99.0.1, and both ends have one kernel. Swapped addresses leave the checksums right.
It needs no netem, which many kernels lack; only tun, and a user namespace or root.

Run as a process of its own (``python -m lab.wan --delay 0.01 --loss 0.01 --rate 50e6``).
"""

import argparse
import contextlib
import fcntl
import heapq
import itertools
import os
import random
import select
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

from lab.processes import LabFailed, end, program

HERE, THERE = "10.99.0.1", "10.99.0.2"
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_DEVICE = "wan0"
_PACKET = 2048
#: What is this short holds no data and takes no turn at the bottleneck.
_SHORT = 200
#: CUBIC is what most hosts have; a namespace may not choose another by sysctl.
_COMMANDS = (
    ["link", "set", "lo", "up"],
    ["link", "set", _DEVICE, "up", "txqueuelen", "10000"],
    ["address", "add", f"{HERE}/24", "dev", _DEVICE],
    ["route", "change", "10.99.0.0/24", "dev", _DEVICE, "src", HERE, "congctl", "cubic"],
)


@dataclass(frozen=True, slots=True)
class Link:
    """What a link is like."""

    delay: float
    """Seconds each way."""
    loss: float
    """The part of all packets that is lost."""
    rate: float
    """Bytes per second, both ways together; a queue of one round trip is before it."""

    @contextlib.contextmanager
    def running(self) -> Iterator[list[str]]:
        """Yield the words before a command that make it run beside the link.

        Raises:
            LabFailed: this machine allows no tun device in a namespace; says why.
        """
        command = ["unshare", "--map-root-user", "--net", sys.executable, "-m", "lab.wan"]
        command += [f"--delay={self.delay}", f"--loss={self.loss}", f"--rate={self.rate}"]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdout=pipe, stderr=pipe) as relay:
            try:
                if not relay.stdout or relay.stdout.readline() != b"ready\n":
                    said = relay.communicate()[1].decode().strip().rpartition("\n")[2]
                    raise LabFailed(f"no link: {said}")
                own = [program("nsenter"), f"--target={relay.pid}", "--user", "--net"]
                yield [*own, "--preserve-credentials"]
            finally:
                end(relay)


class Relay:
    """Packets under way, ordered by the time at which they arrive."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._chance = random.Random(1)
        self._order = itertools.count()
        self._under_way: list[tuple[float, int, bytes]] = []
        self._is_free = 0.0  # when the bottleneck has sent all before

    def take(self, packet: bytes, now: float) -> None:
        """Take a packet: it is lost, or arrives later from where it was sent to."""
        link = self._link
        if packet[0] >> 4 != 4 or self._chance.random() < link.loss:  # noqa: PLR2004 - IPv4
            return
        leaves = now
        if len(packet) > _SHORT:
            if self._is_free - now > 2 * link.delay:
                return
            leaves = self._is_free = max(now, self._is_free) + len(packet) / link.rate
        swapped = packet[:12] + packet[16:20] + packet[12:16] + packet[20:]
        heapq.heappush(self._under_way, (leaves + link.delay, next(self._order), swapped))

    def due(self, now: float) -> Iterator[bytes]:
        """Yield what has arrived."""
        while self._under_way and self._under_way[0][0] <= now:
            yield heapq.heappop(self._under_way)[2]

    def wait(self, now: float) -> float | None:
        """Return the seconds to the next arrival; None: nothing is under way."""
        return max(0.0, self._under_way[0][0] - now) if self._under_way else None


def _serve(relay: Relay, tun: int) -> None:
    while True:
        select.select([tun], [], [], relay.wait(time.monotonic()))
        with contextlib.suppress(BlockingIOError):
            while True:
                relay.take(os.read(tun, _PACKET), time.monotonic())
        for packet in relay.due(time.monotonic()):
            with contextlib.suppress(BlockingIOError):
                os.write(tun, packet)


def main() -> None:
    """Make the device, and relay until killed."""
    parser = argparse.ArgumentParser("lab.wan")
    for name in Link.__slots__:
        parser.add_argument(f"--{name}", type=float, required=True)
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    flags = struct.pack("16sH", _DEVICE.encode(), _IFF_TUN | _IFF_NO_PI)
    fcntl.ioctl(tun, _TUNSETIFF, flags)
    for words in _COMMANDS:
        subprocess.run([program("ip"), *words], check=True)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    _serve(Relay(Link(**vars(parser.parse_args()))), tun)


if __name__ == "__main__":
    main()
