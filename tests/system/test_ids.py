# SPDX-License-Identifier: Apache-2.0
"""Ids: one path component, whatever a client writes; nothing else is ever opened."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from tests.system.answers import UNKNOWN
from tests.system.clients import read_answer
from tests.system.harness import Answer, Server, program, wait_until
from tests.system.skips import needs

NOT_FOUND = (404, "not found")
CONTENT = b"the one image that may be read"

#: Request targets, as bytes on the wire, and what they are answered. ``good`` is a transfer in
#: the config directory, ``outside`` one beside it.
TARGETS: dict[str, tuple[bytes, tuple[int, str]]] = {
    "no such id": (b"/images/nobody", UNKNOWN),
    "no id": (b"/images/", NOT_FOUND),
    "no id, no slash": (b"/images", NOT_FOUND),
    "empty component": (b"/images//extents", UNKNOWN),
    "dot": (b"/images/.", UNKNOWN),
    "dot dot": (b"/images/..", UNKNOWN),
    "encoded dot": (b"/images/%2e", UNKNOWN),
    "encoded dot dot": (b"/images/%2E%2e", UNKNOWN),
    "dot dot sub-route": (b"/images/../extents", UNKNOWN),
    "star": (b"/images/*", UNKNOWN),
    "encoded star": (b"/images/%2a", UNKNOWN),
    "traversal": (b"/images/../outside", NOT_FOUND),
    "long traversal": (b"/images/../../../../../../etc/passwd", NOT_FOUND),
    "traversal and back": (b"/images/../config/good", NOT_FOUND),
    "encoded traversal": (b"/images/..%2foutside", UNKNOWN),
    "encoded dots and slash": (b"/images/%2e%2e%2Foutside", UNKNOWN),
    "encoded long traversal": (b"/images/..%2f..%2f..%2f..%2fetc%2fpasswd", UNKNOWN),
    "encoded absolute path": (b"/images/%2fetc%2fpasswd", UNKNOWN),
    "encoded slash before sub-route": (b"/images/good%2Fextents", UNKNOWN),
    "encoded slash in lower case": (b"/images/good%2fflush", UNKNOWN),
    "encoded trailing slash": (b"/images/good%2f", UNKNOWN),
    "encoded slash into directory": (b"/images/directory%2finner", UNKNOWN),
    "slash into directory": (b"/images/directory/inner", NOT_FOUND),
    "encoded slash before images": (b"/%2fimages/good", (404, "")),
    "slash encoded twice": (b"/images/good%252Fextents", UNKNOWN),
    "encoded NUL": (b"/images/good%00", UNKNOWN),
    "encoded NUL inside": (b"/images/good%00.json", UNKNOWN),
    "backslash": (b"/images/..\\outside", UNKNOWN),
    "encoded backslash": (b"/images/..%5coutside", UNKNOWN),
    "blank": (b"/images/%20", UNKNOWN),
    "trailing blank": (b"/images/good%20", UNKNOWN),
    "longest name": (b"/images/" + b"a" * 255, UNKNOWN),
    "longer than a name": (b"/images/" + b"a" * 256, UNKNOWN),
    "very long": (b"/images/" + b"a" * 8000, UNKNOWN),
    "very long, wide": (b"/images/" + b"%c3%a9" * 1000, UNKNOWN),
    "non-UTF-8": (b"/images/%ff%fe", UNKNOWN),
    "cut UTF-8": (b"/images/%c3", UNKNOWN),
    "overlong slash": (b"/images/..%c0%afoutside", UNKNOWN),
    "surrogate": (b"/images/%ed%a0%80", UNKNOWN),
    "replacement character": (b"/images/%ef%bf%bd", UNKNOWN),
    "link to outside": (b"/images/link", UNKNOWN),
    "directory": (b"/images/directory", UNKNOWN),
    "FIFO": (b"/images/fifo", UNKNOWN),
    "case differs": (b"/images/GOOD", UNKNOWN),
    "route in other case": (b"/Images/good", NOT_FOUND),
    "deeper route": (b"/images/good/extents/more", NOT_FOUND),
    "no such sub-route": (b"/images/good/passwd", NOT_FOUND),
    "root": (b"/", NOT_FOUND),
    "another tree": (b"/etc/passwd", NOT_FOUND),
}


@pytest.fixture(scope="module")
def home(workplace: Path) -> Path:
    """Images and transfers where requests must not reach them; one where they may."""
    home = workplace / "home"
    config = home / "config"
    (config / "directory").mkdir(parents=True, mode=0o700)
    config.chmod(0o700)
    (home / "image").write_bytes(CONTENT)
    (home / "secret").write_bytes(b"secret")
    secret = json.dumps({"backend": "file", "file": str(home / "secret")})
    for path in (home / "outside", config / "directory" / "inner"):
        path.write_text(secret)
        path.chmod(0o600)
    (config / "link").symlink_to(home / "outside")
    os.mkfifo(config / "fifo", 0o600)
    return home


@pytest.fixture(scope="module")
def server(home: Path):
    with Server(home) as running:
        running.add("good", backend="file", file=str(home / "image"))
        yield running


def ask(server: Server, target: bytes, method: bytes = b"GET") -> Answer:
    request = method + b" " + target + b" HTTP/1.1\r\nHost: x\r\n\r\n"
    with server.raw(request, 10) as sock, sock.makefile("rb") as stream:
        return read_answer(stream, method.decode())


def check(answer: Answer, expected: tuple[int, str]) -> None:
    status, message = expected
    assert answer.refusal == (status, message or answer.error)


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_that_names_no_transfer_is_404(server, name):
    target, expected = TARGETS[name]
    check(ask(server, target), expected)


@pytest.mark.parametrize("method", [b"HEAD", b"PUT", b"PATCH", b"DELETE", b"OPTIONS"])
@pytest.mark.parametrize("name", ["dot dot", "encoded traversal", "encoded NUL", "very long"])
def test_an_impossible_id_is_404_for_every_method(server, name, method):
    target, expected = TARGETS[name]
    answer = ask(server, target, method)
    assert answer.status == 404
    if method != b"HEAD":
        check(answer, expected)


@pytest.mark.parametrize(
    "target",
    [
        pytest.param(b"/images/good", id="plain"),
        pytest.param(b"/images/good/", id="trailing slash"),
        pytest.param(b"/images/%67ood", id="encoded letter"),
        pytest.param(b"/images/good?path=%2f..%2fetc&x=%00", id="encoded slash in the query"),
        pytest.param(b"http://host/images/good", id="absolute form"),
    ],
)
def test_a_target_that_names_the_transfer_gets_its_image(server, target):
    answer = ask(server, target)
    assert (answer.status, answer.body) == (200, CONTENT)


@pytest.mark.parametrize(
    ("name", "target"),
    [
        pytest.param("a%2Fb", b"/images/a%252Fb", id="looks encoded"),
        pytest.param("...", b"/images/...", id="three dots"),
        pytest.param("..good", b"/images/..good", id="begins with dots"),
        pytest.param("disk é 磁盤", b"/images/disk%20%c3%a9%20%e7%a3%81%e7%9b%a4", id="UTF-8"),
        pytest.param("x" * 255, b"/images/" + b"x" * 255, id="longest"),
        pytest.param("extents", b"/images/extents", id="like a route"),
        pytest.param("a+b;c=d", b"/images/a+b;c=d", id="plus, semicolon"),
    ],
)
def test_an_odd_name_is_an_id_like_any_other(server, home, name, target):
    path = home / "config" / name
    path.write_text(json.dumps({"backend": "file", "file": str(home / "image")}))
    path.chmod(0o600)
    answer = ask(server, target)
    path.unlink()
    assert (answer.status, answer.body) == (200, CONTENT)


def paths_between(trace: str, begin: str, end: str) -> set[str]:
    """Return the paths that system calls named between the look-ups of two ids.

    A call relative to a descriptor reads ``newfstatat(7</dir>, "name", ...)`` in the trace.
    """
    lines = trace.splitlines()
    first = next(i for i, line in enumerate(lines) if f'"{begin}"' in line)
    last = next(i for i, line in enumerate(lines) if f'"{end}"' in line)
    found = set()
    call = re.compile(r'\w+\((?:(?:\d+|AT_FDCWD)<([^>]*)>, )?"((?:[^"\\]|\\.)*)"')
    for line in lines[first:last]:
        if match := call.search(line):
            # Escapes stand for bytes that are no separators, but for the backslash itself.
            found.add(os.path.normpath(os.path.join(match[1] or "", match[2])))
    return found


@needs("ptrace")
def test_no_id_makes_the_server_open_anything_outside_the_config_directory(home, workplace):
    copy = workplace / "traced"
    shutil.copytree(home / "config", copy / "config", symlinks=True, ignore=lambda *_: {"fifo"})
    os.mkfifo(copy / "config" / "fifo", 0o600)
    trace = workplace / "trace"
    server = Server(copy)
    # -D: the tracer is a grandchild, so that the server's pid stays gunicorn's.
    strace = [program("strace"), "-D", "-f", "-q", "-y", "--seccomp-bpf", "-e", "trace=%file"]
    server.command = [*strace, "-s", "9999", "-o", str(trace), *server.command]
    with server:
        url = server.add("good", backend="file", file=str(home / "image")).encode()
        for _ in range(30):  # what Python imports late has been imported afterwards
            assert ask(server, url).status == 200
            assert ask(server, b"/images/warm").status == 404
            assert ask(server, b"/images/warm%2f").status == 404
        pid = server.process.pid
        ask(server, b"/images/first-mark")
        answers = {name: ask(server, target).status for name, (target, _) in TARGETS.items()}
        ask(server, b"/images/last-mark")
    end = re.compile(rf"^{pid} .*\+\+\+ exited with 0", re.MULTILINE)
    wait_until(lambda: end.search(trace.read_text()))
    assert answers == dict.fromkeys(TARGETS, 404)
    config = copy / "config"
    looked_at = paths_between(trace.read_text(), "first-mark", "last-mark")
    assert {str(config), str(config / "nobody"), str(config / "link")} <= looked_at
    # Workers look after their files of counts four times a second, whatever is asked.
    own = {str(config), str(copy / "run" / "metrics")}
    assert {p for p in looked_at if p not in own and os.path.dirname(p) not in own} == set()
