# SPDX-License-Identifier: Apache-2.0
"""docs/extending.md is true: the back end that it shows, added by its steps, is served."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.harness import ROOT, Server

TEXT = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
#: The file that a block is for, the language, the text.
BLOCK = re.compile(
    r"`(imageserver/[\w/.]+)`:\n\n```(python|diff)\n(.*?)^```$", re.DOTALL | re.MULTILINE
)
SIZE = 4096


def _patched(text: str, diff: str) -> str:
    """Apply a diff whose hunks have context before the only line that each adds."""
    for hunk in diff.split("@@\n")[1:]:
        lines = hunk.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] != "+")
        assert text.count(old) == 1, old
        text = text.replace(old, "".join(line[1:] for line in lines))
    return text


@pytest.fixture(scope="module")
def server(workplace: Path) -> Iterator[Server]:
    """A server of one worker, with the back end of the document."""
    root = workplace / "checkout"
    skipped = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "imageserver", root / "imageserver", ignore=skipped)
    shutil.copy(ROOT / "gunicorn.conf.py", root)
    blocks = BLOCK.findall(TEXT)
    assert [language for _, language, _ in blocks] == ["python"] * 3 + ["diff"]
    for name, language, text in blocks:
        path = root / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(_patched(path.read_text(), text) if language == "diff" else text)

    server = Server(workplace, workers=1)
    server.command = ["env", f"--chdir={root}", *server.command]
    server.env["PYTHONPATH"] = str(root)
    (server.config / "m").write_text(f'{{"backend":"memory","name":"x","size":{SIZE}}}')
    with server:
        yield server


def _options(server: Server) -> tuple[object, ...]:
    answer = server.request("OPTIONS", "/images/m")
    return answer.headers["Allow"], answer.json["features"], answer.json["max_writers"]


def test_a_back_end_added_by_the_steps_is_served(server: Server) -> None:
    assert _options(server) == ("GET, HEAD, PUT, PATCH, OPTIONS", ["extents", "zero", "digest"], 1)

    data = bytes(range(256)) * (SIZE // 256)
    assert server.request("PUT", "/images/m", data).json["bytes_written"] == SIZE
    assert server.request("GET", "/images/m").body == data
    part = server.request("GET", "/images/m", headers={"Range": "bytes=256-257"})
    assert (part.status, part.body) == (206, b"\0\1")

    ranged = {"Content-Range": f"bytes 5-7/{SIZE}"}
    assert server.request("PUT", "/images/m", b"abc", ranged).status == 200
    assert server.request("GET", "/images/m").body[:9] == data[:5] + b"abc" + data[8:9]
    assert server.request("GET", "/images/m/extents").json == [
        {"start": 0, "length": SIZE, "zero": False}
    ]
    zero = f'{{"op":"zero","size":{SIZE}}}'.encode()
    assert server.request("PATCH", "/images/m", zero, {"Content-Type": "application/json"}).json
    assert server.request("GET", "/images/m/extents").json[0]["zero"]


def test_its_refusals_its_log_lines_and_its_unknown_fields_follow_from_its_row(
    server: Server,
) -> None:
    wrong = server.request("PUT", "/images/m", b"short")
    assert wrong.refusal == (400, f"Content-Length (5) must equal export size ({SIZE})")
    flush = server.request("POST", "/images/m/flush")
    assert flush.refusal == (400, "flush not supported by this export")

    (server.config / "typo").write_text('{"backend":"memory","name":"x","size":"1"}')
    assert server.request("GET", "/images/typo").refusal == (404, "unknown image_id")
    assert r"\"size\" must be 0 to 1048576" in server.log
    (server.config / "none").write_text('{"backend":"nfs"}')
    assert server.request("GET", "/images/none").refusal == (404, "unknown image_id")
    assert r"\"backend\" must be \"nbd\" or \"file\" or \"memory\"" in server.log
