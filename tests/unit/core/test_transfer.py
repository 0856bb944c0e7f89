# SPDX-License-Identifier: Apache-2.0
"""Transfers: every field a control program may write, and every id a client may ask for."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imageserver.backends.file.kind import FileImage
from imageserver.backends.nbd.kind import NbdImage
from imageserver.backends.table import KINDS
from imageserver.core.transfer import (
    InvalidTransfer,
    Transfer,
    parse_transfer,
    to_fields,
    transfer_from_fields,
)

NBD = {"socket": "/run/x.sock"}
FILE = {"backend": "file", "file": "/images/x.qcow2"}
LONGEST_SOCKET = "/" + "s" * 106


def _parse(fields: object) -> Transfer:
    return parse_transfer("t", json.dumps(fields).encode(), KINDS)


@pytest.mark.parametrize(
    ("fields", "transfer"),
    [
        pytest.param(
            {"backend": "nbd", "socket": "/run/x.sock", "export": "vda", "export_bitmap": "b0"},
            Transfer("t", NbdImage("/run/x.sock", "vda", "b0")),
            id="nbd",
        ),
        pytest.param(NBD, Transfer("t", NbdImage("/run/x.sock")), id="nbd-is-the-default"),
        pytest.param(FILE, Transfer("t", FileImage("/images/x.qcow2")), id="file"),
        pytest.param(
            NBD | {"read_only": True}, Transfer("t", NbdImage("/run/x.sock"), True), id="read-only"
        ),
        pytest.param(
            FILE | {"read_only": True},
            Transfer("t", FileImage("/images/x.qcow2"), True),
            id="file-read-only",
        ),
        pytest.param(
            NBD | {"read_only": False}, Transfer("t", NbdImage("/run/x.sock")), id="writable"
        ),
        pytest.param(
            NBD | dict.fromkeys(["backend", "export", "export_bitmap", "read_only"]),
            Transfer("t", NbdImage("/run/x.sock")),
            id="null-is-absent",
        ),
        pytest.param(
            NBD | {"backend": "NBD"}, Transfer("t", NbdImage("/run/x.sock")), id="nbd-in-capitals"
        ),
        pytest.param(
            FILE | {"backend": "FiLe"},
            Transfer("t", FileImage("/images/x.qcow2")),
            id="file-in-mixed-case",
        ),
        pytest.param(
            {"socket": " \t\n/run/x.sock\r "},
            Transfer("t", NbdImage("/run/x.sock")),
            id="blanks-around-socket",
        ),
        pytest.param(
            FILE | {"file": " /images/a b \n"},
            Transfer("t", FileImage("/images/a b")),
            id="blanks-around-file-only",
        ),
        pytest.param(
            NBD | {"export": " vda "},
            Transfer("t", NbdImage("/run/x.sock", " vda ")),
            id="blanks-belong-to-export",
        ),
        pytest.param(
            NBD | {"export": "", "export_bitmap": ""},
            Transfer("t", NbdImage("/run/x.sock")),
            id="empty-export-and-bitmap",
        ),
        pytest.param(
            NBD | {"later": {"a": [1]}, "file": 5},
            Transfer("t", NbdImage("/run/x.sock")),
            id="unknown-fields-ignored",
        ),
        pytest.param(
            FILE | {"socket": 5, "export": []},
            Transfer("t", FileImage("/images/x.qcow2")),
            id="file-ignores-fields-of-nbd",
        ),
        pytest.param(
            NBD | {"export": "d\u00efsk \U0001f4be"},
            Transfer("t", NbdImage("/run/x.sock", "d\u00efsk \U0001f4be")),
            id="unicode",
        ),
        pytest.param(
            {"socket": LONGEST_SOCKET}, Transfer("t", NbdImage(LONGEST_SOCKET)), id="longest-socket"
        ),
    ],
)
def test_a_usable_object_is_a_transfer(fields: object, transfer: Transfer) -> None:
    assert _parse(fields) == transfer


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        pytest.param({}, 'missing "socket"', id="no-socket"),
        pytest.param({"socket": None}, 'missing "socket"', id="socket-null"),
        pytest.param({"backend": "file"}, 'missing "file"', id="no-file"),
        pytest.param(FILE | {"file": None}, 'missing "file"', id="file-null"),
        pytest.param({"socket": ""}, '"socket" must not be blank', id="socket-empty"),
        pytest.param({"socket": " \t\n"}, '"socket" must not be blank', id="socket-blank"),
        pytest.param(FILE | {"file": " "}, '"file" must not be blank', id="file-blank"),
        pytest.param({"socket": 5}, '"socket" must be a string', id="socket-number"),
        pytest.param({"socket": False}, '"socket" must be a string', id="socket-false"),
        pytest.param({"socket": ["/x"]}, '"socket" must be a string', id="socket-list"),
        pytest.param(FILE | {"file": {}}, '"file" must be a string', id="file-object"),
        pytest.param(NBD | {"export": 0}, '"export" must be a string', id="export-number"),
        pytest.param(NBD | {"export": ["vda"]}, '"export" must be a string', id="export-list"),
        pytest.param(
            NBD | {"export_bitmap": True}, '"export_bitmap" must be a string', id="bitmap-true"
        ),
        pytest.param(NBD | {"backend": 1}, '"backend" must be a string', id="backend-number"),
        pytest.param(NBD | {"backend": {}}, '"backend" must be a string', id="backend-object"),
        pytest.param(NBD | {"read_only": 1}, '"read_only" must be true or false', id="read-only-1"),
        pytest.param(NBD | {"read_only": 0}, '"read_only" must be true or false', id="read-only-0"),
        pytest.param(
            NBD | {"read_only": "true"}, '"read_only" must be true or false', id="read-only-string"
        ),
        pytest.param(
            FILE | {"read_only": []}, '"read_only" must be true or false', id="read-only-list"
        ),
        pytest.param(NBD | {"sparse": 0}, '"sparse" must be true or false', id="sparse-0"),
        pytest.param({"socket": "/x\0y"}, '"socket" must not contain NUL', id="nul-in-socket"),
        pytest.param(FILE | {"file": "/x\0"}, '"file" must not contain NUL', id="nul-in-file"),
        pytest.param(NBD | {"export": "\0"}, '"export" must not contain NUL', id="nul-in-export"),
        pytest.param(
            NBD | {"export_bitmap": "b\0"},
            '"export_bitmap" must not contain NUL',
            id="nul-in-bitmap",
        ),
        pytest.param(
            {"socket": "/\ud800"}, '"socket" must be valid Unicode', id="surrogate-in-socket"
        ),
        pytest.param(
            FILE | {"file": "/\udc80"}, '"file" must be valid Unicode', id="surrogate-in-file"
        ),
        pytest.param(
            NBD | {"export": "\udfff"}, '"export" must be valid Unicode', id="surrogate-in-export"
        ),
        pytest.param(
            NBD | {"backend": "\ud800"}, '"backend" must be valid Unicode', id="surrogate-backend"
        ),
        pytest.param({"socket": "x.sock"}, '"socket" must be an absolute path', id="relative"),
        pytest.param(
            FILE | {"file": "../etc/passwd"}, '"file" must be an absolute path', id="dots"
        ),
        pytest.param(
            {"socket": "@name"}, '"socket" must be an absolute path', id="abstract-socket"
        ),
        pytest.param(
            {"socket": LONGEST_SOCKET + "s"},
            '"socket" must be at most 107 bytes long',
            id="socket-too-long",
        ),
        pytest.param(
            {"socket": "/" + "\u00e9" * 54},
            '"socket" must be at most 107 bytes long',
            id="socket-too-long-in-bytes",
        ),
        pytest.param(
            NBD | {"export": "x" * 5000},
            '"export" makes a name of over 4096 bytes',
            id="export-too-long",
        ),
        pytest.param(
            NBD | {"export_bitmap": "x" * 4079},
            '"export_bitmap" makes a name of over 4096 bytes',
            id="bitmap-too-long",
        ),
    ],
)
def test_an_unusable_field_is_named(fields: object, message: str) -> None:
    with pytest.raises(InvalidTransfer) as failure:
        _parse(fields)

    assert str(failure.value).startswith(message)


@pytest.mark.parametrize("name", ["", "ceph", "nbd ", " file", "nbd\n", "qcow2", "\ufb01le"])
def test_an_unknown_backend_is_named_with_those_there_are(name: str) -> None:
    with pytest.raises(InvalidTransfer) as failure:
        _parse(NBD | FILE | {"backend": name})

    message = str(failure.value)
    assert message.startswith("unsupported backend: ")
    assert message.endswith('"backend" must be "nbd" or "file"')


def test_a_message_stays_on_one_line_whatever_the_file_says() -> None:
    with pytest.raises(InvalidTransfer) as failure:
        _parse(NBD | {"backend": "x\nERROR forged"})

    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b" \n", id="blank"),
        pytest.param(b"socket=/run/x.sock", id="no-json"),
        pytest.param(b'{"socket":"/run/x.sock"', id="cut-short"),
        pytest.param(b'{"socket":"/run/x.sock",}', id="trailing-comma"),
        pytest.param(b'{"socket":"/run/x.sock"}{}', id="two-objects"),
        pytest.param(b'{"socket":"/run/x.sock"}\0\0', id="padded-with-nul"),
        pytest.param(b'{"socket":"/run/\xff"}', id="invalid-utf8"),
        pytest.param(b"[" * 60_000, id="deep-and-cut-short"),
        pytest.param(
            b'{"socket":"/x","deep":' + b"[" * 20_000 + b"]" * 20_000 + b"}", id="deep-nesting"
        ),
        pytest.param(b'{"socket":"/run/x.sock","n":NaN}', id="nan"),
        pytest.param('{"socket":"/run/x.sock"}'.encode("utf-16"), id="utf-16"),
    ],
)
def test_a_text_that_is_not_json_is_refused_as_such(text: bytes) -> None:
    with pytest.raises(InvalidTransfer, match="not valid JSON"):
        parse_transfer("t", text, KINDS)


def test_a_surrogate_in_the_bytes_of_a_path_is_refused() -> None:
    with pytest.raises(InvalidTransfer):
        parse_transfer("t", b'{"socket":"/\xed\xa0\x80"}', KINDS)


@pytest.mark.parametrize("text", [b"[]", b'"/run/x.sock"', b"5", b"null", b"true", b'[{"a":1}]'])
def test_json_that_is_no_object_is_refused(text: bytes) -> None:
    with pytest.raises(InvalidTransfer, match="not a JSON object"):
        parse_transfer("t", text, KINDS)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        pytest.param({"readonly": True}, ['unknown field "readonly"; did you mean "read_only"?']),
        pytest.param({"exprt": "a"}, ['unknown field "exprt"; did you mean "export"?']),
        pytest.param({"READ_ONLY": 1}, ['unknown field "READ_ONLY"; did you mean "read_only"?']),
        pytest.param({"owner": "me"}, ['unknown field "owner"']),
        pytest.param({"file": "/a"}, ['field "file" is of backend "file"']),
        pytest.param({"a\n\ud800": 1}, ['unknown field "a??"']),
        pytest.param({"x" * 99: 1}, [f'unknown field "{"x" * 64}"']),
        pytest.param({"exprt": None}, []),
        pytest.param({"transfer_id": "t", "export": "a", "export_bitmap": "b"}, []),
        pytest.param(
            {str(n): n for n in range(10)},
            [*(f'unknown field "{n}"' for n in range(8)), "and 2 more"],
        ),
    ],
    ids=["readonly", "exprt", "case", "unlike", "other", "bytes", "long", "null", "known", "many"],
)
def test_fields_that_are_ignored_are_named_with_the_nearest(
    fields: dict[str, object], told: list[str]
) -> None:
    transfer = transfer_from_fields("t", {"socket": "/a.sock"} | fields, KINDS)

    assert list(transfer.ignored) == told


@pytest.mark.parametrize(
    ("flush", "trusted"), [("image", True), ("connection", False), (None, False)]
)
def test_a_transfer_may_say_that_any_flush_covers_the_image(flush: object, trusted: bool) -> None:
    transfer = transfer_from_fields("t", {"socket": "/a.sock", "flush": flush}, KINDS)

    assert transfer.image == NbdImage("/a.sock", flushes_image=trusted)
    assert transfer_from_fields("t", to_fields(transfer), KINDS) == transfer


@pytest.mark.parametrize(("sparse", "punches"), [(True, True), (None, True), (False, False)])
def test_a_transfer_may_say_that_what_is_zeroed_stays_allocated(
    sparse: object, punches: bool
) -> None:
    transfer = transfer_from_fields("t", {"socket": "/a.sock", "sparse": sparse}, KINDS)

    assert transfer.image == NbdImage("/a.sock", sparse=punches)
    assert transfer.image.pinned() == transfer.image
    assert transfer_from_fields("t", to_fields(transfer), KINDS) == transfer


@pytest.mark.parametrize("flush", ["", "Image", "all", True, 1, ["image"]], ids=repr)
def test_any_other_word_on_flushes_is_refused(flush: object) -> None:
    with pytest.raises(
        InvalidTransfer, match=r'^"flush" must be "connection" or "image"$|must be a string$'
    ):
        transfer_from_fields("t", {"socket": "/a.sock", "flush": flush}, KINDS)


def test_a_field_of_the_other_backend_is_ignored() -> None:
    transfer = transfer_from_fields("t", {"backend": "FILE", "file": "/a", "export": "vda"}, KINDS)

    assert transfer.ignored == ('field "export" is of backend "nbd"',)


def test_of_a_field_that_comes_twice_the_last_counts() -> None:
    twice = b'{"socket":"/a","socket":"/b","read_only":false,"read_only":true}'

    assert parse_transfer("t", twice, KINDS) == Transfer("t", NbdImage("/b"), True)


_FIELDS = st.sampled_from(
    ["backend", "socket", "export", "export_bitmap", "file", "read_only", "x"]
)
_VALUES = (
    st.sampled_from([None, True, "nbd", "file", "/x", " ", "\0", "\ud800", 1e300, [], {}])
    | st.integers()
    | st.text(max_size=5)
)


@settings(max_examples=200, deadline=None)
@given(fields=st.dictionaries(_FIELDS, _VALUES))
def test_any_object_is_a_transfer_or_refused(fields: dict[str, object]) -> None:
    try:
        transfer = transfer_from_fields("t", fields, KINDS)
    except InvalidTransfer:
        return

    paths = [fields.get("socket"), fields.get("file")]
    image = transfer.image
    path = image.socket if isinstance(image, NbdImage) else image.path
    assert path in [p.strip() for p in paths if isinstance(p, str)]
    assert transfer.read_only is (fields.get("read_only") is True)


@settings(max_examples=200, deadline=None)
@given(text=st.binary(max_size=64))
def test_any_bytes_are_a_transfer_or_refused(text: bytes) -> None:
    with pytest.raises(InvalidTransfer):
        parse_transfer("t", text, KINDS)
