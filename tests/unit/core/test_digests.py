# SPDX-License-Identifier: Apache-2.0
"""Content-Digest and Repr-Digest of a body (docs/api.md): which digest counts, what is refused."""

import base64
import contextlib
import hashlib
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imageserver.core.digests import Expected, parse_digest
from imageserver.core.errors import BadRequest

BODY = b"hello world\n"
SHA_256, SHA_512 = hashlib.sha256(BODY).digest(), hashlib.sha512(BODY).digest()


def member(name: str, digest: bytes) -> str:
    return f"{name}=:{base64.b64encode(digest).decode()}:"


WEAKER, STRONGER = member("sha-256", SHA_256), member("sha-512", SHA_512)
UNPADDED = WEAKER.replace("=:", "\0", 1).replace("=", "").replace("\0", "=:")


@pytest.mark.parametrize(
    ("value", "algorithm"),
    [
        # RFC 9530, appendix B.1 and D
        ("sha-256=:RK/0qy18MlBSVnWgjwz6lZEWjP/lF5HF9bvEF8FabDg=:", "sha-256"),
        (WEAKER, "sha-256"),
        (STRONGER, "sha-512"),
        (f"{WEAKER},{STRONGER}", "sha-512"),
        (f"{STRONGER} \t, \t{WEAKER}", "sha-512"),
        (f"{member('md5', b'm' * 16)}, {WEAKER}", "sha-256"),
        (f'{WEAKER};a;b=1;c=-1.5;  d="x\\"y";e=t/1;f=:AA==:;*g=?0', "sha-256"),
        (f"{member('sha-256', b'short')}, {WEAKER}", "sha-256"),  # the last of a key counts
        (UNPADDED, "sha-256"),
        (f"  {WEAKER} ", "sha-256"),
        (member("md5", b"m" * 16), None),
        ("unixsum=::", None),
        ("", None),
    ],
)
def test_the_strongest_known_digest_counts(value: str, algorithm: str | None) -> None:
    expected = parse_digest("Content-Digest", value)

    digests = {"sha-256": SHA_256, "sha-512": SHA_512}
    if "RK/0" in value:
        digests["sha-256"] = base64.b64decode("RK/0qy18MlBSVnWgjwz6lZEWjP/lF5HF9bvEF8FabDg=")
    assert expected == (
        Expected("Content-Digest", algorithm, digests[algorithm]) if algorithm else None
    )


@pytest.mark.parametrize(
    "value",
    [
        "sha-256",
        "sha-256=",
        "sha-256=abc",
        "sha-256=?1",
        'sha-256="abc"',
        f"({WEAKER})",
        SHA_256.hex(),
        f"sha-256={SHA_256.hex()}",
        WEAKER.upper(),
        WEAKER.replace("=:", " =:"),
        WEAKER[:-1],
        f"{WEAKER},",
        f",{WEAKER}",
        f"{WEAKER},,{STRONGER}",
        f"{WEAKER} {STRONGER}",
        f"{WEAKER};",
        f"{WEAKER};a=",
        f"{WEAKER}\n",
        f"{WEAKER}, unixsum=30637",
        f"{WEAKER}, md5=:A:",
        f"{WEAKER}, md5=:A=A=:",
        member("sha-256", SHA_256[:-1]),
        member("sha-256", SHA_512),
        member("sha-256", b""),
        f"{STRONGER}, {member('sha-256', b'short')}",
        f"{WEAKER}, {member('sha-512', b'short')}",
        "sha-256=:é:",
        "ä",
    ],
)
@pytest.mark.parametrize("header", ["Content-Digest", "Repr-Digest"])
def test_what_is_no_dictionary_of_digests_is_refused_by_name(header: str, value: str) -> None:
    with pytest.raises(BadRequest, match=f"^invalid {header}$"):
        parse_digest(header, value)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["sha-256", "sha-512", "md5", "*x"]),
            st.binary(min_size=64, max_size=64),
        ),
        min_size=1,
    ),
    st.sampled_from([",", ", ", " ,\t"]),
)
@settings(deadline=None)
def test_whatever_is_written_is_read(members: list[tuple[str, bytes]], comma: str) -> None:
    members = [(name, value[:32] if name == "sha-256" else value) for name, value in members]
    found = parse_digest("Repr-Digest", comma.join(member(*each) for each in members))

    last = dict(members)
    name = next((name for name in ("sha-512", "sha-256") if name in last), None)
    assert found == (Expected("Repr-Digest", name, last[name]) if name else None)


@given(st.text(alphabet=string.printable, max_size=200) | st.text(alphabet='sha-2561=:,; "?Aa/'))
@settings(deadline=None)
def test_any_text_is_taken_or_refused(value: str) -> None:
    with contextlib.suppress(BadRequest):
        parse_digest("Content-Digest", value)


def test_a_long_field_is_refused_quickly() -> None:
    for value in (f"{WEAKER};a" * 400, f'{WEAKER};a="' + "\\" * 8000, "a" * 8000, "a=:" * 2000):
        with pytest.raises(BadRequest):
            parse_digest("Content-Digest", value + "!")
