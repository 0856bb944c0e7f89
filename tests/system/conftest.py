# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests against a real server."""

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.system.controlling import Control
from tests.system.disks import BIG, OLD, refill, sparse
from tests.system.harness import Server, free_port, qemu_nbd
from tests.system.lying import Liar, liars
from tests.system.pki import make_pki
from tests.system.watching import Admin


@pytest.fixture(scope="module")
def workplace() -> Iterator[Path]:
    """A private directory with a short path: Unix sockets have 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="is-") as name:
        os.chmod(name, 0o700)
        yield Path(name)


@pytest.fixture
def home(workplace: Path) -> Path:
    """A directory of the test's own."""
    return Path(tempfile.mkdtemp(dir=workplace))


@pytest.fixture(scope="module")
def pki(workplace: Path) -> Path:
    """Certificates of a CA of our own."""
    return make_pki(workplace / "pki")


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest, workplace: Path) -> Iterator[Server]:
    """A server with three workers and the module's ``SETTINGS``, shared by its tests."""
    with Server(workplace, **getattr(request.module, "SETTINGS", {})) as running:
        yield running


@pytest.fixture
def control(server: Server) -> Control:
    """What speaks to a server that has a control socket."""
    return Control(server.directory / "control")


@pytest.fixture(scope="module")
def tcp() -> Admin:
    """Who asks the admin listener at a port."""
    return Admin(free_port())


@pytest.fixture(scope="module")
def unix(workplace: Path) -> Admin:
    """Who asks it at a Unix socket."""
    return Admin(workplace / "admin")


@pytest.fixture(params=["tcp", "unix"])
def admin(request: pytest.FixtureRequest, server: Server) -> Admin:
    """Who asks it at either, for a server that listens at both."""
    found: Admin = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """An image's id of the test's own."""
    return request.node.name.removeprefix("test_")[:60]


@pytest.fixture(scope="module")
def raw_nbd(workplace: Path) -> Iterator[Path]:
    """The socket at which the file of ``disk`` is served."""
    disk = workplace / "disk.raw"
    disk.write_bytes(OLD)
    with qemu_nbd(disk, "--discard=unmap") as sock:
        yield sock


@pytest.fixture(params=["nbd", "raw"])
def disk(request: pytest.FixtureRequest, server: Server, raw_nbd: Path, workplace: Path) -> Path:
    """The file of ``DISK``, with the old bytes in it: behind an NBD server, or served as it is."""
    disk = workplace / "disk.raw"
    if request.param == "nbd":
        server.add("disk", socket=str(raw_nbd))
    else:
        server.add("disk", backend="file", file=str(disk), format="raw")
    refill(disk, OLD)
    return disk


@pytest.fixture(scope="module")
def big(workplace: Path) -> Iterator[dict[str, str]]:
    """The transfer of an image that no buffers hold."""
    with qemu_nbd(sparse(workplace / "big", BIG)) as sock:
        yield {"socket": str(sock)}


@pytest.fixture
def serve() -> Iterator[Callable[..., Liar]]:
    """What starts a server that does as the test says."""
    with liars() as start:
        yield start
