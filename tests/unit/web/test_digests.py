# SPDX-License-Identifier: Apache-2.0
"""Content-Digest and Repr-Digest over fake ports: which requests they count for, and when."""

import base64
import hashlib

import pytest
from falcon import testing

from tests.unit.fakes import World
from tests.unit.webapp import error_of

BODY = b"abcdefghij"
JSON = {"Content-Type": "application/json"}
RANGE = {"Range": "bytes=2-4"}
PLACE = {"Content-Range": "bytes 2-4/*"}


def digest_of(data: bytes) -> str:
    return f"sha-256=:{base64.b64encode(hashlib.sha256(data).digest()).decode()}:"


@pytest.mark.parametrize("name", ["Content-Digest", "Repr-Digest"])
@pytest.mark.parametrize("image", ["t1", "f1"])
def test_a_whole_image_is_verified_by_either_field(
    world: World, client: testing.TestClient, image: str, name: str
) -> None:
    path = f"/images/{image}"
    right = client.simulate_put(path, headers={name: digest_of(BODY)}, body=BODY)
    wrong = client.simulate_put(path, headers={name: digest_of(b"other")}, body=BODY)

    assert (right.status_code, right.json) == (200, {"ok": True, "bytes_written": 10})
    told = {"error": f"body does not match its {name}", "bytes_written": 10}
    assert (wrong.status_code, wrong.json) == (400, told)
    assert world.journal[-2:] == ["free", "unlock"]


@pytest.mark.parametrize(
    ("method", "place"), [("PUT", PLACE), ("PATCH", RANGE)], ids=["PUT", "PATCH"]
)
def test_a_part_is_verified_by_the_digest_of_its_content_alone(
    client: testing.TestClient, method: str, place: dict[str, str]
) -> None:
    def write(**fields: str) -> testing.Result:
        headers = place | {name.replace("_", "-"): value for name, value in fields.items()}
        return client.simulate_request(method, "/images/t1", headers=headers, body=b"xyz")

    whole = {"Repr_Digest": digest_of(b"the whole image")}
    assert write(**whole, Content_Digest=digest_of(b"xyz")).status_code == 200
    assert write(Repr_Digest="not even a digest").status_code == 200
    wrong = write(**whole, Content_Digest=digest_of(b"other"))
    told = {"error": "body does not match its Content-Digest", "bytes_written": 3}
    assert (wrong.status_code, wrong.json) == (400, told)


def test_both_fields_must_be_right(client: testing.TestClient) -> None:
    headers = {"Content-Digest": digest_of(BODY), "Repr-Digest": digest_of(b"other")}
    result = client.simulate_put("/images/t1", headers=headers, body=BODY)

    assert result.json["error"] == "body does not match its Repr-Digest"


def test_what_does_not_match_is_flushed_as_what_does(
    world: World, client: testing.TestClient
) -> None:
    headers = {"Content-Digest": digest_of(b"other")}
    client.simulate_put("/images/t1?flush=y", headers=headers, body=BODY)

    assert (world.content, "flush" in world.journal) == (BODY, True)


@pytest.mark.parametrize(
    ("method", "more", "name"),
    [
        ("PUT", {}, "Content-Digest"),
        ("PUT", {}, "Repr-Digest"),
        ("PUT", PLACE, "Content-Digest"),
        ("PATCH", RANGE, "Content-Digest"),
    ],
)
def test_a_malformed_field_is_refused_before_anything_is_taken(
    world: World, client: testing.TestClient, method: str, more: dict[str, str], name: str
) -> None:
    headers = more | {name: "sha-256=abc"}
    result = client.simulate_request(method, "/images/t1", headers=headers, body=b"xyz")

    assert error_of(result) == (400, f"invalid {name}")
    assert {"lock", "slot", "open"}.isdisjoint(world.journal)


def test_a_digest_of_an_unknown_algorithm_and_one_of_a_command_say_nothing(
    client: testing.TestClient,
) -> None:
    unknown = {"Content-Digest": "md5=:AAAAAAAAAAAAAAAAAAAAAA==:"}
    assert client.simulate_put("/images/t1", headers=unknown, body=BODY).status_code == 200
    command = JSON | {"Content-Digest": digest_of(b"other")}
    body = b'{"op":"flush"}'
    assert client.simulate_patch("/images/t1", headers=command, body=body).status_code == 200
