# SPDX-License-Identifier: Apache-2.0
"""Tokens from a file or the environment, and who is sent them."""

from pathlib import Path

import pytest

from imageserver.client.checking.probe import Connection, Request
from imageserver.client.commands.options import Options
from imageserver.client.failures import LocalFailure
from imageserver.client.http.access import Access
from imageserver.client.local.token_file import VARIABLE, read_token
from tests.unit.client.test_transport import port

URL = "http://127.0.0.1:1/images/x"


@pytest.fixture
def options(tmp_path: Path) -> Options:
    (tmp_path / "token").write_text(" of-the-file\n")
    return Options(None, None, None, None, json=False, token_file=str(tmp_path / "token"))


def test_the_token_of_the_file_wins_over_the_environments(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "of-the-environment\n")
    without = Options(None, None, None, None, json=False)

    assert options.access(URL).token == "of-the-file"  # noqa: S105
    assert without.access(URL).fields == {"Authorization": "Bearer of-the-environment"}
    monkeypatch.setenv(VARIABLE, " ")
    assert without.access(URL).fields == {}


def test_no_text_of_an_access_tells_its_token(options: Options) -> None:
    assert "of-the" not in repr(options.access(URL))


@pytest.mark.parametrize(
    "text",
    [b"", b"\n", b"s3cr3t\nword", b"s3cr3t\xff", b"x" * 70_000],
    ids=["empty", "blank", 2, 3, 4],
)
def test_a_file_with_something_else_is_refused_without_telling_it(
    tmp_path: Path, text: bytes
) -> None:
    (tmp_path / "token").write_bytes(text)

    with pytest.raises(LocalFailure, match="cannot be one") as caught:
        read_token(str(tmp_path / "token"))
    assert "s3cr3t" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(LocalFailure, match=r"/none: No such file"):
        read_token(str(tmp_path / "none"))


def test_requests_of_checks_show_the_token() -> None:
    seen: list[bytes] = []

    def serve(sock: object) -> None:
        while head := sock.recv(65536):  # type: ignore[attr-defined]
            seen.append(head)
            sock.sendall(b"HTTP/1.1 400 No\r\nContent-Length: 0\r\n\r\n")  # type: ignore[attr-defined]

    with port(serve) as number:
        access = Access(f"http://127.0.0.1:{number}/images/x", token="s3cr3t")  # noqa: S106
        with Connection(access) as connection:
            connection.ask(Request("GET", headers={"Range": "bytes=0-0"}))
            connection.ask_expecting("PUT", {"Range": "bytes=0-0"}, b"x")

    assert [head.count(b"\r\nAuthorization: Bearer s3cr3t\r\n") for head in seen] == [1, 1]
