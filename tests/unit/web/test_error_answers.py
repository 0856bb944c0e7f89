# SPDX-License-Identifier: Apache-2.0
"""From every leaf of the tree of errors to its answer; nothing internal ever gets out."""

import logging
import os

import pytest
from falcon import testing

from imageserver.core import errors
from imageserver.core.errors import ClientGone, ImageServerError
from imageserver.core.slots import Kind
from imageserver.web.error_answers import TABLE, answer_for
from tests.unit.fakes import World
from tests.unit.shortages import no_threads
from tests.unit.webapp import Call, app_over

RETRY = {"Retry-After": "1"}
INTERNAL = "/run/secret.sock: nbd_connect_unix"

#: One of each (a leaf may have several), and what clients are told (docs/api.md).
ANSWERS = [
    (errors.BadRequest("what is wrong"), 400, "what is wrong", {}),
    (errors.UnsupportedMediaType("what type"), 415, "what type", {}),
    (errors.NotFound(INTERNAL), 404, "not found", {}),
    (errors.UnknownImage(INTERNAL), 404, "unknown image_id", {}),
    (
        errors.Unauthorized(INTERNAL),
        401,
        "missing or wrong token",
        {"WWW-Authenticate": "Bearer"},
    ),
    (errors.MethodNotAllowed(("GET", "PUT")), 405, "method not allowed", {"Allow": "GET, PUT"}),
    (
        errors.RangeOutsideImage(7),
        416,
        "range not satisfiable",
        {"Content-Range": "bytes */7"},
    ),
    (errors.PreconditionFailed(INTERNAL), 412, "precondition failed", {}),
    (errors.ImageBusy(INTERNAL), 409, "image busy", RETRY),
    (errors.NoSlot(Kind.READ), 503, "too many parallel reads", RETRY),
    (errors.NoSlot(Kind.WRITE), 503, "too many parallel writes", RETRY),
    (errors.NoSlot(Kind.OTHER), 503, "server busy", RETRY),
    (errors.NoSlot(Kind.WORKER), 503, "server busy", RETRY),
    (errors.NoImageSlot(Kind.READ), 503, "too many parallel reads", RETRY),
    (errors.NoImageSlot(Kind.WRITE), 503, "too many parallel writes", RETRY),
    (errors.BackendError(INTERNAL), 500, "backend error", {}),
    (errors.BackendTimeout(INTERNAL), 504, "backend timeout", {}),
    (errors.ImageChanged(INTERNAL), 500, "backend error", {}),
    (errors.FileAccessError(INTERNAL), 500, "failed to access file", {}),
    (errors.NoSpace(INTERNAL), 507, "no space left", {}),
    (errors.StateUnavailable(INTERNAL), 503, "server state unavailable", RETRY),
    (errors.Exhausted(INTERNAL), 503, "server busy", RETRY),
    (errors.StateFull(INTERNAL), 507, "no space left", RETRY),
    (errors.DigestMismatch("Repr-Digest", 7), 400, "body does not match its Repr-Digest", {}),
    (errors.ShortBody(5), 400, "request body ended early at 5 bytes", {}),
]


def _descendants(root: type[ImageServerError]) -> set[type[ImageServerError]]:
    return {root}.union(*(_descendants(child) for child in root.__subclasses__()))


def test_every_error_but_a_vanished_client_has_a_row_and_a_test() -> None:
    # An adapter's own errors, loaded or not, are answered as what they are kinds of.
    tree = {cls for cls in _descendants(ImageServerError) if cls.__module__ == errors.__name__}
    answered = tree - {ImageServerError, ClientGone}

    assert answered == TABLE.keys()
    assert answered == {type(error) for error, *_ in ANSWERS}


def test_every_kind_of_slot_has_a_message() -> None:
    kinds = {error.kind for error, *_ in ANSWERS if isinstance(error, errors.NoSlot)}

    assert kinds == set(Kind)


@pytest.mark.parametrize(("error", "status", "message", "headers"), ANSWERS, ids=repr)
def test_an_error_is_answered_as_the_table_says(
    error: ImageServerError, status: int, message: str, headers: dict[str, str]
) -> None:
    world = World(fail={"lock": error})

    client = testing.TestClient(app_over(world), headers={"X-Request-Id": "r1"})
    result = client.simulate_post("/images/t1/flush")

    told = {"error": message, **answer_for(error).fields}
    assert (result.status_code, result.json) == (status, told)
    expected = {
        "accept-ranges": "bytes",
        "access-control-allow-methods": "GET, PUT, OPTIONS",
        "cache-control": "no-store",
        "content-type": "application/json",
        "content-length": str(len(result.content)),
        "x-request-id": "r1",
    } | {name.lower(): value for name, value in headers.items()}
    assert result.headers == expected


def test_a_new_leaf_is_answered_as_its_parent() -> None:
    class Slower(errors.BackendTimeout):
        """A leaf that the table has not heard of."""

    assert answer_for(Slower("")).status == 504


def test_a_bug_is_answered_in_general_terms_and_logged_with_its_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.ERROR, "imageserver.web.error_answers")
    bug = ZeroDivisionError(INTERNAL)
    world = World(fail={"open FLUSH": bug})

    result = testing.TestClient(app_over(world)).simulate_post("/images/t1/flush")

    assert (result.status_code, result.json) == (500, {"error": "internal error"})
    assert result.headers["accept-ranges"] == "bytes"
    (record,) = caplog.records
    assert record.exc_info is not None
    assert (record.getMessage(), record.exc_info[1]) == ("POST /images/t1/flush failed", bug)
    assert world.journal[-2:] == ["free", "unlock"]


@pytest.mark.parametrize("number", sorted(errors.NO_DESCRIPTOR))
def test_a_call_that_finds_no_descriptor_is_no_bug(
    caplog: pytest.LogCaptureFixture, number: int
) -> None:
    caplog.set_level(logging.ERROR, "imageserver.web.error_answers")
    world = World(fail={"open FLUSH": OSError(number, os.strerror(number))})

    result = testing.TestClient(app_over(world)).simulate_post("/images/t1/flush")

    assert (result.status_code, result.json) == (503, {"error": "server busy"})
    assert result.headers["retry-after"] == "1"
    assert caplog.records == []


def test_options_of_an_image_that_finds_no_descriptor_are_those_of_its_configuration() -> None:
    world = World(fail={"open INSPECT": errors.Exhausted(INTERNAL)})

    result = testing.TestClient(app_over(world)).simulate_options("/images/t1")

    assert (result.status_code, result.json["features"]) == (
        200,
        ["extents", "zero", "flush", "digest", "checksum", "qcow2"],
    )


def test_without_a_thread_to_keep_it_alive_a_transfer_is_not_begun() -> None:
    world = World()
    client = testing.TestClient(app_over(world))
    with no_threads():
        refused = client.simulate_post("/images/ex/flush")
    served = client.simulate_post("/images/ex/flush")

    assert (refused.status_code, refused.json) == (503, {"error": "server busy"})
    assert world.journal[:2] == ["visit", "leave"]
    assert served.status_code == 200


def test_a_vanished_client_is_the_servers_to_cut_off() -> None:
    world = World(fail={"flush": ClientGone()})

    with pytest.raises(ClientGone):
        Call(app_over(world), "POST", "/images/t1/flush")
    assert world.journal[-3:] == ["close", "free", "unlock"]
