# SPDX-License-Identifier: Apache-2.0
"""``format=qcow2`` over fake ports: what is taken, answered, refused and given back."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
from falcon import testing

from imageserver.core.errors import BackendError, ClientGone, ImageChanged
from imageserver.core.kinds import ImageInfo
from imageserver.core.validators import Validators
from imageserver.images.probing import Asking, WouldTransfer
from imageserver.web.body import ASKING
from imageserver.web.requests import IS_GONE
from tests.unit.fakes import World
from tests.unit.qcow2_disks import qemu_img
from tests.unit.webapp import COMMON, Call, app_over, error_of

URL = "/images/t1?format=qcow2"
DIRTY = f"{URL}&context=dirty"
TAKEN = ["lock briefly", "slot READ together", "unlock", "open EXTENTS", "extents 0-10 dirty=False"]
GIVEN_BACK = ["close", "free"]
#: Header, refcounts (two clusters), L1; one L2 table and one data cluster.
LENGTH = 6 << 16


@pytest.fixture
def world() -> World:
    return World(batches=[[(0, 4, False, False), (4, 6, True, True)]])


def get(client: testing.TestClient, url: str = URL, **headers: str) -> testing.Result:
    return client.simulate_get(url, headers={k.replace("_", "-"): v for k, v in headers.items()})


def test_a_file_is_sent_by_a_reader_who_lets_other_such_readers_in(
    client: testing.TestClient, world: World
) -> None:
    result = client.simulate_get(URL, headers={"X-Request-Id": "r1"})

    assert result.status_code == 200
    assert dict(result.headers) == COMMON | {
        "content-type": "application/octet-stream",
        "content-length": str(LENGTH),
        "etag": result.headers["etag"],
    }
    assert world.journal == [*TAKEN, "extents 0-10 dirty=False", *GIVEN_BACK]
    assert world.progress[-1] == (LENGTH, LENGTH)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "disk")
        path.write_bytes(result.content)
        qemu_img("check", "-f", "qcow2", path)
        raw = Path(name, "raw")
        qemu_img("convert", "-f", "qcow2", "-O", "raw", path, raw)
        assert raw.read_bytes() == b"0123456789" + bytes(502), "the cluster is read whole"


def test_head_says_what_get_sends(client: testing.TestClient, world: World) -> None:
    whole = get(client)
    world.journal.clear()
    result = client.simulate_head(URL)

    told = {"content-length", "etag", "content-type"}
    assert [result.headers[name] for name in told] == [whole.headers[name] for name in told]
    assert world.journal == [*TAKEN, *GIVEN_BACK]


def test_head_is_work_for_a_thread_that_transfers(world: World) -> None:
    environ: dict[str, Any] = {ASKING: Asking.ELSEWHERE, "QUERY_STRING": "format=qcow2"}
    with pytest.raises(WouldTransfer):
        Call(app_over(world), "HEAD", "/images/t1", **environ)

    assert world.journal == []


@pytest.mark.parametrize(
    ("header", "start", "stop"),
    [("bytes=0-9", 0, 10), ("bytes=70000-", 70000, LENGTH), ("bytes=-65540", LENGTH - 65540, None)],
)
def test_ranges_are_parts_of_the_file(
    client: testing.TestClient, header: str, start: int, stop: int
) -> None:
    whole = get(client)
    for more in ({}, {"If_Range": whole.headers["etag"]}):
        result = get(client, Range=header, **more)
        assert (result.status_code, result.content) == (206, whole.content[start:stop])
        last = start + len(result.content) - 1
        assert result.headers["content-range"] == f"bytes {start}-{last}/{LENGTH}"
        assert result.headers["etag"] == whole.headers["etag"]


@pytest.mark.parametrize(
    "condition", ['"another"', "W/{}", "Sun, 29 Nov 2026 00:00:00 GMT", "*", ""], ids=repr
)
def test_another_validator_gets_the_whole_file(client: testing.TestClient, condition: str) -> None:
    whole = get(client)
    result = get(client, Range="bytes=10-", If_Range=condition.format(whole.headers["etag"]))

    assert (result.status_code, result.content) == (200, whole.content)
    assert "content-range" not in result.headers


def test_the_etag_changes_with_layout_parameters_image_and_server(
    client: testing.TestClient, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.dirty_bitmap = "b0"
    backing = "&backing={}&backing_format=raw"
    urls = [URL, f"{URL}&cluster_size=4096", DIRTY]
    urls += [DIRTY + backing.format(name) for name in "ab"]
    tags = [get(client, url).headers["etag"] for url in urls]
    world.batches = [[(0, 10, False, False)]]
    same = get(client).headers["etag"]
    world.batches = [[(0, 10, True, False)]]
    tags.append(get(client).headers["etag"])
    tags.append(get(client, "/images/ro?format=qcow2").headers["etag"])
    monkeypatch.setattr("imageserver.backends.nbd.kind.NbdImage.stamp", lambda _: "another server")
    tags.append(get(client).headers["etag"])

    assert same == tags[0], "the same clusters"
    assert tags.pop(6) == tags[5], "another right to the same image"
    assert len(set(tags)) == len(tags)


def test_the_etag_of_a_files_qcow2_file_changes_with_the_files(
    client: testing.TestClient, world: World
) -> None:
    found = []
    for state in (Validators('"a"', 1), Validators('"b"', 1), Validators(None, 1)):
        world.info = ImageInfo(10, False, True, True, multi_conn=True, state=state)
        found.append(get(client).headers.get("etag"))

    assert found[2] is None, "it has just been changed"
    assert len(set(found)) == 3


def has_bytes_named(world: World) -> None:
    """Give the image an ``ETag``, as a raw file has."""
    state = Validators('"a"', 1)
    world.info = ImageInfo(10, False, True, True, multi_conn=True, state=state)


@pytest.mark.parametrize("is_raw", [False, True], ids=["export", "raw"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_another_state_than_is_asked_for_is_412_and_no_byte_of_it_is_sent(
    client: testing.TestClient, world: World, method: str, is_raw: bool
) -> None:
    """... before the range counts."""
    if is_raw:
        has_bytes_named(world)
    seen = get(client).headers["etag"]
    for headers in ({"If-Match": seen}, {"If-Match": "*"}):
        assert client.simulate_request(method, URL, headers=headers).status_code == 200
    world.batches = [[(0, 10, True, False)]]
    for headers in ({}, {"Range": "bytes=7-"}, {"Range": f"bytes={LENGTH}-"}):
        world.journal.clear()
        result = client.simulate_request(method, URL, headers={"If-Match": seen} | headers)

        assert result.status_code == 412
        assert world.journal == [*TAKEN, *GIVEN_BACK]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_what_the_client_has_is_304_where_the_etag_names_bytes(
    client: testing.TestClient, world: World, method: str
) -> None:
    """Of an export the same layout may have other bytes: a mirror would keep the old ones."""
    seen = {"If-None-Match": get(client).headers["etag"]}
    assert client.simulate_request(method, URL, headers=seen).status_code == 200

    has_bytes_named(world)
    tag = get(client).headers["etag"]
    world.journal.clear()
    result = client.simulate_request(method, URL, headers={"If-None-Match": f'"b", {tag}'})

    assert (result.status_code, result.content) == (304, b"")
    assert dict(result.headers) == COMMON | {"etag": tag, "cache-control": "no-cache"}
    assert world.journal == [*TAKEN, *GIVEN_BACK]
    assert client.simulate_request(method, URL, headers=seen).status_code == 200


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_malformed_condition_is_400_before_anything_is_taken(
    client: testing.TestClient, world: World, method: str
) -> None:
    result = client.simulate_request(method, URL, headers={"If-Match": "a"})

    assert result.status_code == 400
    assert world.journal == []


def test_only_what_names_bytes_may_be_kept(client: testing.TestClient, world: World) -> None:
    assert get(client).headers["cache-control"] == "no-store"
    has_bytes_named(world)
    assert get(client).headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("is_raw", [False, True], ids=["export", "raw"])
@pytest.mark.parametrize(
    ("condition", "names_state"),
    [
        ({}, False),
        ({"If-Match": "*"}, False),
        ({"If-Match": "{}"}, True),
        ({"If-Range": "{}", "Range": "bytes=9-"}, True),
    ],
    ids=str,
)
def test_bytes_of_another_state_are_never_sent_as_of_this_one(
    client: testing.TestClient,
    world: World,
    is_raw: bool,
    condition: dict[str, str],
    names_state: bool,
) -> None:
    """Where the extents are the same, too, only a raw file's ``ETag`` tells."""
    if is_raw:
        has_bytes_named(world)
    whole = get(client)
    headers = {name: value.format(whole.headers["etag"]) for name, value in condition.items()}
    call = Call(app_over(world), "GET", "/images/t1", headers, QUERY_STRING="format=qcow2")
    pieces = iter(call.pieces)
    first = bytes(next(pieces))
    world.is_unchanged = lambda: False

    assert call.headers["etag"] == whole.headers["etag"]
    if is_raw and names_state:
        with pytest.raises(ImageChanged):
            next(pieces)
    else:
        assert whole.content.endswith(first + b"".join(pieces))
    call.close()
    assert world.journal[-2:] == GIVEN_BACK


def test_an_overlay_has_what_is_dirty_and_names_its_backing_file(
    client: testing.TestClient, world: World
) -> None:
    world.dirty_bitmap = "b0"
    result = get(client, f"{DIRTY}&backing=full%20%C3%A4.raw&backing_format=raw")

    assert result.headers["image-dirty-bitmap"] == "b0"
    assert "open DIRTY_EXTENTS" in world.journal
    assert "full ä.raw".encode() in result.content[:4096]


def test_without_a_bitmap_the_file_is_complete_and_stands_alone(
    client: testing.TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    result = get(client, f"{DIRTY}&backing=full.raw&backing_format=raw")

    assert result.headers["image-dirty-bitmap"] == "none"
    assert result.content == get(client).content
    assert "no dirty bitmap" in caplog.text


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("format=vmdk", 'invalid "format": it must be raw or qcow2'),
        ("format=", 'invalid "format": it must be raw or qcow2'),
        ("format=raw&format=qcow2", 'invalid "format": there must be one'),
        ("context=dirty", '"context" goes with format=qcow2'),
        ("format=raw&cluster_size=4096", '"cluster_size" goes with format=qcow2'),
        *(
            (f"format=qcow2&{wrong}", message)
            for wrong, message in (
                *(
                    (
                        f"cluster_size={size}",
                        'invalid "cluster_size": it must be a power of two from 4096 to 2097152',
                    )
                    for size in ("2048", "4194304", "65537", "64K", "-65536", "")
                ),
                ("context=all", 'invalid "context": it must be zero or dirty'),
                ("context=dirty&backing=a", '"backing" and "backing_format" go together'),
                ("backing_format=raw", '"backing" and "backing_format" go together'),
                (
                    "backing=a&backing_format=raw",
                    '"backing" goes with context=dirty: a full image has no backing file',
                ),
                (
                    "context=dirty&backing=a&backing_format=vpc",
                    'invalid "backing_format": it must be raw or qcow2',
                ),
                *(
                    (
                        f"context=dirty&backing={name}&backing_format=raw",
                        'invalid "backing": it must be 1 to 1023 bytes of printable UTF-8',
                    )
                    for name in ("", "a%0A", "%00", "%FF", "a" * 1024)
                ),
            )
        ),
    ],
)
def test_what_is_wrong_is_named_with_what_is_right(
    client: testing.TestClient, world: World, query: str, message: str
) -> None:
    assert error_of(client.simulate_get(f"/images/t1?{query}")) == (400, message)
    assert world.journal == []


def test_what_only_the_image_tells_is_refused_then(
    client: testing.TestClient, world: World
) -> None:
    assert error_of(get(client, Range="bytes=9-8")) == (416, "range not satisfiable")
    assert world.journal[-2:] == GIVEN_BACK
    assert error_of(get(client, Range="bytes=x")) == (400, "invalid Range header")


def test_files_that_are_sent_as_they_are_have_none(client: testing.TestClient) -> None:
    message = "format=qcow2 not supported for file backend; a file is sent as it is"
    assert error_of(get(client, "/images/f1?format=qcow2")) == (400, message)
    assert client.simulate_get("/images/f1?format=raw").content == b"0123456789"


def test_a_walk_that_fails_is_an_error(client: testing.TestClient, world: World) -> None:
    world.fail["extents 0-10 dirty=False"] = BackendError("no extents")

    assert error_of(get(client)) == (500, "backend error")
    assert world.journal == [*TAKEN, *GIVEN_BACK]


def test_a_client_that_leaves_ends_the_walk(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imageserver.images.qcow2_stream._CHECK_SECONDS", 0)
    environ: dict[str, Any] = {IS_GONE: lambda: True, "QUERY_STRING": "format=qcow2"}
    with pytest.raises(ClientGone):
        Call(app_over(world), "GET", "/images/t1", **environ)

    assert world.journal == [*TAKEN, *GIVEN_BACK]
