# SPDX-License-Identifier: Apache-2.0
"""What is asked of a server, and over how many connections."""

import os

import pytest

from imageserver.client.failures import Busy, Different, Refused
from imageserver.client.http.access import Access
from imageserver.client.http.made_file import MadeFile
from imageserver.client.http.remote import Remote
from imageserver.client.http.transport import Transport


@pytest.mark.parametrize(
    ("url", "sock", "cpus", "asked", "most", "many"),
    [
        ("http://backup.example/images/a", None, 1, None, 8, 4),
        ("http://backup.example/images/a", None, 64, None, 3, 3),
        ("http://127.0.0.1:54323/images/a", None, 2, None, 8, 1),
        ("http://localhost:54323/images/a", None, 5, None, 8, 2),
        ("http://[::1]:54323/images/a", None, 64, None, 8, 4),
        ("http://backup.example/images/a", "/run/imageserver.sock", 1, None, 8, 1),
        ("http://127.0.0.1:54323/images/a", None, 2, 8, 8, 8),
        ("http://127.0.0.1:54323/images/a", None, 2, 8, 0, 1),
    ],
)
def test_a_server_on_this_machine_shares_its_cpus(
    monkeypatch: pytest.MonkeyPatch, url, sock, cpus, asked, most, many
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: range(cpus))
    assert Remote(Access(url, unix_socket=sock)).connections(asked, most) == many


@pytest.mark.parametrize(
    ("url", "image", "extents"),
    [
        ("/images/x", "/images/x", "/images/x/extents?context=zero"),
        ("/images/x//", "/images/x", "/images/x/extents?context=zero"),
        ("", "/", "/extents?context=zero"),
    ],
    ids=lambda target: target or "none",
)
def test_what_lies_below_an_image_is_appended_to_its_path(
    monkeypatch: pytest.MonkeyPatch, url, image, extents
):
    asked = []

    def request(_self, _method, target, **_rest):
        asked.append(target)
        raise Refused("no")

    monkeypatch.setattr(Transport, "request", request)
    remote = Remote(Access(f"http://x{url}"))
    for action in (remote.abilities, lambda: list(remote.extents())):
        with pytest.raises(Refused):
            action()
    assert asked == [image, extents]


class _Head:
    """An answer to HEAD."""

    def __init__(self, **fields: str) -> None:
        self.headers = {"Content-Length": "10"} | fields

    def close(self):
        pass

    def drain_conn(self) -> None: ...


def test_a_range_of_an_image_that_has_another_size_by_now_is_refused(
    monkeypatch: pytest.MonkeyPatch,
):
    def request(_self, method, _target, **_rest):
        return _Head(**{"Content-Range": "bytes 0-4/11", "Content-Length": "10"})

    monkeypatch.setattr(Transport, "request", request)
    image = Remote(Access("http://x/images/a"))
    assert image.size() == 10
    with pytest.raises(Different, match="the image had 10 bytes, and has 11, as its server says"):
        next(image.read(0, 5))


def test_a_file_that_the_server_makes_is_read_as_long_as_it_is_that_one(
    monkeypatch: pytest.MonkeyPatch,
):
    asked, etags = [], iter(['"a"', '"a"', '"b"'])

    def request(_self, method, target, headers=None, **_rest):
        asked.append((method, target, headers))
        if method == "HEAD":
            return _Head(ETag=next(etags))
        raise Refused("the whole file", 200)

    monkeypatch.setattr(Transport, "request", request)
    image = Remote(Access("http://x/images/a"))
    file = MadeFile(image)
    assert (file.etag, file.size()) == ('"a"', 10)
    with pytest.raises(Different, match="where the image has data has changed"):
        file.size()
    with pytest.raises(Different, match="where the image has data has changed"):
        next(file.read(0, 10))
    with pytest.raises(Refused):
        next(image.read(0, 10))
    made = "/images/a?format=qcow2"
    assert asked[:3] == [("HEAD", made, None)] * 3
    assert asked[3:] == [
        ("GET", made, {"Range": "bytes=0-9", "If-Range": '"a"'}),
        ("GET", "/images/a", {"Range": "bytes=0-9"}),
    ]


def test_a_file_without_etag_is_asked_for_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Transport, "request", lambda *_args, **_more: _Head())
    with pytest.raises(Busy, match="cannot tell yet"):
        MadeFile(Remote(Access("http://x/images/a")))
