# SPDX-License-Identifier: Apache-2.0
"""Tokens: which fields show one, and that nothing tells it."""

import pytest

from imageserver.backends.nbd.kind import NbdImage
from imageserver.backends.table import KINDS
from imageserver.core.token import UNTOLD, Token, is_token
from imageserver.core.transfer import (
    InvalidTransfer,
    Transfer,
    to_fields,
    to_secret_fields,
    transfer_from_fields,
)

TOKEN = Token("s3cr3t-+/=")
LONGEST = "x" * 4096


@pytest.mark.parametrize(
    "authorization",
    ["Bearer s3cr3t-+/=", "bearer s3cr3t-+/=", "BEARER   s3cr3t-+/=", "Bearer s3cr3t-+/= "],
)
def test_a_token_is_shown_after_the_scheme_in_any_case(authorization: str) -> None:
    assert TOKEN.is_shown(authorization)


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        " ",
        "Bearer",
        "Bearer ",
        "s3cr3t-+/=",
        "Bearers3cr3t-+/=",
        "Bearer\ts3cr3t-+/=",
        "Basic s3cr3t-+/=",
        "Bearer S3cr3t-+/=",
        "Bearer s3cr3t-+/",
        "Bearer s3cr3t-+/==",
        "Bearer s3cr3t-+/=,Bearer s3cr3t-+/=",
        "Bearer x s3cr3t-+/=",
        'Bearer "s3cr3t-+/="',
        "Bearer s3cr3t-+/\u00bd",
        "Bearer \udc80",
    ],
    ids=repr,
)
def test_no_other_field_shows_it(authorization: str | None) -> None:
    assert not TOKEN.is_shown(authorization)


def test_nothing_shows_a_token_that_is_not_told() -> None:
    assert not any(UNTOLD.is_shown(field) for field in ("Bearer", "Bearer ", "Bearer  ", ""))


def test_neither_text_of_a_token_tells_it() -> None:
    transfer = Transfer("t", NbdImage("/s"), token=TOKEN)

    assert "s3cr3t" not in f"{TOKEN} {TOKEN!r} {transfer} {transfer!r}"


@pytest.mark.parametrize(("text", "valid"), [("!~", True), (LONGEST, True), ("a" + LONGEST, False)])
def test_a_token_is_visible_ascii_of_bounded_length(text: str, valid: bool) -> None:
    assert is_token(text) is valid


@pytest.mark.parametrize(("value", "token"), [("s3cr3t-+/=", TOKEN), (None, None)])
def test_a_transfer_may_have_a_token(value: object, token: Token | None) -> None:
    transfer = transfer_from_fields("t", {"socket": "/s", "token": value}, KINDS)

    assert (transfer.token, transfer.ignored) == (token, ())
    assert transfer_from_fields("t", to_secret_fields(transfer), KINDS) == transfer


@pytest.mark.parametrize(
    "value",
    [
        "",
        " ",
        "\t\n",
        "s3cr3t word",
        "s3cr3t\n",
        "s3cr3t\0",
        "s3cr3t\u00fc",
        "\ud800",
        LONGEST + "x",
    ],
    ids=ascii,
)
def test_what_no_field_could_show_is_no_token_and_is_not_told(value: str) -> None:
    with pytest.raises(InvalidTransfer) as caught:
        transfer_from_fields("t", {"socket": "/s", "token": value}, KINDS)
    assert str(caught.value) == (
        '"token" must be 1 to 4096 visible ASCII characters, without blanks'
    )


@pytest.mark.parametrize("value", [True, False, 5, 0, ["s3cr3t"], {"a": "s3cr3t"}], ids=repr)
def test_a_token_of_another_type_is_refused_and_not_told(value: object) -> None:
    with pytest.raises(InvalidTransfer, match=r'^"token" must be a string$'):
        transfer_from_fields("t", {"socket": "/s", "token": value}, KINDS)


def test_fields_that_are_shown_say_only_that_there_is_a_token_and_cannot_be_registered() -> None:
    transfer = Transfer("t", NbdImage("/s"), token=TOKEN)

    assert to_fields(transfer) == to_fields(Transfer("t", NbdImage("/s"))) | {"token": True}
    with pytest.raises(InvalidTransfer):
        transfer_from_fields("t", to_fields(transfer), KINDS)
