# SPDX-License-Identifier: Apache-2.0
"""The claim of a runtime directory's path: it lasts as long as a process that has it."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from imageserver.runtime.pathclaim import PathClaim, claimants
from tests.unit.processes import holding

_CLAIM = """
import subprocess, sys
from imageserver.runtime.pathclaim import PathClaim
claim = PathClaim(sys.argv[1])
assert claim.take()
print("held", flush=True)
sys.stdin.readline()
with subprocess.Popen(["cat"], stdin=subprocess.PIPE, close_fds=False) as child:
    claim.close()
    print("let go", flush=True)
    sys.stdin.readline()
    child.stdin.close()
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "run")


@pytest.fixture
def claim(path: str) -> Iterator[PathClaim]:
    claim = PathClaim(path)
    yield claim
    claim.close()


def test_a_path_is_claimed_by_one_server(path: str, claim: PathClaim) -> None:
    assert claimants(path) == []
    assert claim.take()
    assert claim.take()

    assert not PathClaim(path).take()
    assert claimants(path) == [os.getpid()]


def test_links_to_a_path_are_the_same_claim(path: str, tmp_path: Path, claim: PathClaim) -> None:
    claim.take()
    (tmp_path / "link").symlink_to(tmp_path)

    assert not PathClaim(f"{tmp_path}/link/run").take()
    assert claimants(f"{tmp_path}/link/run/") == [os.getpid()]


def test_another_path_is_free(path: str, claim: PathClaim) -> None:
    claim.take()

    with contextlib.closing(PathClaim(path + "2")) as other:
        assert other.take()


def test_a_child_goes_on_with_the_claim_of_its_parent(path: str, claim: PathClaim) -> None:
    claim.take()
    gone, end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(end)
        os.read(gone, 1)
        os._exit(0)
    claim.close()

    assert not claim.take()
    assert claimants(path) == [child]
    os.close(end)
    os.waitpid(child, 0)
    os.close(gone)
    assert claimants(path) == []
    assert claim.take()


def test_what_a_claimant_executes_has_no_claim(path: str) -> None:
    with holding(_CLAIM, path) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert claimants(path) == [process.pid]
        process.stdin.write("go on\n")
        process.stdin.flush()
        assert process.stdout.readline() == "let go\n"

        assert claimants(path) == []
        process.communicate("end\n", timeout=10)


def test_a_killed_claimant_has_no_claim(path: str, claim: PathClaim) -> None:
    with holding(_CLAIM, path) as process:
        assert not claim.take()
        process.kill()
        process.wait(10)
        assert claim.take()


def test_a_name_that_no_process_of_ours_has_claims_nothing(
    path: str, claim: PathClaim, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anybody may bind an abstract socket: that must not keep a server from its directory."""
    claim.take()
    monkeypatch.setattr(os, "geteuid", lambda: 65432)

    assert claimants(path) == []


def test_without_a_socket_there_is_no_claim_and_no_error(
    path: str, claim: PathClaim, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_descriptor(*_: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(socket, "socket", no_descriptor)
    assert not claim.take()
    monkeypatch.undo()
    assert claim.take()
