# SPDX-License-Identifier: Apache-2.0
"""Where one run of ``share`` lives."""

import socket
from contextlib import closing

import pytest

from imageserver.sharing.place import LOOPBACK, Address
from imageserver.sharing.shown import copy_names


def test_a_reserved_port_is_free_for_the_server_and_nobody_else_gets_it() -> None:
    address = Address.reserve(LOOPBACK)
    with closing(address.holder), socket.socket() as server, socket.socket() as other:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((LOOPBACK, address.port))
        server.listen()
        with pytest.raises(OSError, match="Address already in use"):
            other.bind((LOOPBACK, address.port))
        assert address.bind == address.reachable == f"127.0.0.1:{address.port}"


@pytest.mark.parametrize(
    ("text", "is_loopback", "begins"),
    [
        ("127.0.0.1:0", True, "127.0.0.1:"),
        ("localhost", True, "localhost:"),
        ("0.0.0.0", False, ""),  # noqa: S104 - who is warned
        ("[::1]", True, "[::1]:"),
        ("::1", True, "[::1]:"),
    ],
)
def test_who_can_reach_an_address_is_known(text: str, is_loopback: bool, begins: str) -> None:
    address = Address.reserve(text)
    with closing(address.holder):
        assert address.is_loopback == is_loopback
        assert address.reachable.startswith(begins)
        assert address.reachable != f"0.0.0.0:{address.port}"


@pytest.mark.parametrize(
    ("files", "copies"),
    [
        (["a/disk.raw", "b/disk.qcow2"], ["disk.copy", "disk-2.copy"]),
        (["-x", "https://host/vm.img?token=1"], ["./-x.copy", "vm.copy"]),
        (["disk.raw", "disk.copy.qcow2"], ["disk-2.copy", "disk.copy.copy"]),
        (["a.raw", "a.img", "a-2.raw"], ["a.copy", "a-2.copy", "a-2-2.copy"]),
    ],
)
def test_a_copy_has_the_name_of_no_file_and_of_no_other_copy(
    files: list[str], copies: list[str]
) -> None:
    assert list(copy_names(files)) == copies
