# SPDX-License-Identifier: Apache-2.0
"""docs/api.md is true: each of its examples gives the answer that it shows.

The first block of shell code starts the demo, as the document says. Every other one is an
example, run in the document's order and followed by a block with its answer: ``http`` a head,
some of whose fields may be left out, and perhaps a body; ``json`` a value, on one line where
it is to be taken to the letter; ``text`` what is printed.
"""

import ast
import contextlib
import json
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from email import message_from_string
from pathlib import Path

import pytest

from tests.system.harness import ROOT, free_port

DOCUMENT = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
ADDRESS = "127.0.0.1:54323"
ADMIN = "127.0.0.1:54324"
SOCKET = "/tmp/imageserver.sock"  # noqa: S108 - as the document has it

FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
#: Where an error's text may stand in the package: the names of what it is given to.
SPEAKERS = {"BadRequest", "UnsupportedMediaType", "Answer", "refusal"}
#: ... and of the tables that have some.
TABLES = {"_HEAD_ERRORS", "_NO_SLOT"}


@dataclass(frozen=True)
class Example:
    """Shell code, and what it prints."""

    heading: str
    code: str
    kind: str
    answer: str


def blocks() -> list[tuple[str, str, str]]:
    """Return heading, language and text of each fenced block."""
    found = []
    for block in FENCE.finditer(DOCUMENT):
        heading = re.findall(r"^##+ (.+)$", DOCUMENT[: block.start()], re.MULTILINE)[-1]
        found.append((heading, block[1], block[2]))
    return found


def examples() -> list[Example]:
    rest = blocks()[1:]
    return [
        Example(heading, code, kind, answer)
        for (heading, _, code), (_, kind, answer) in zip(rest[0::2], rest[1::2], strict=True)
    ]


class Demo:
    """The running demo, and where it lives in place of the document's addresses."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._places = {
            ADDRESS: f"127.0.0.1:{free_port()}",
            ADMIN: f"127.0.0.1:{free_port()}",
            SOCKET: str(directory / "http.sock"),
        }
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("IMAGESERVER_")}
        self.env["TMPDIR"] = str(directory)
        self.env["IMAGESERVER_ADMIN_BIND"] = self._places[ADMIN]

    def here(self, text: str) -> str:
        for documented, actual in self._places.items():
            text = text.replace(documented, actual)
        return text

    @contextlib.contextmanager
    def running(self, code: str) -> Iterator[None]:
        command = ["bash", "-c", f"exec env {self.here(code)}"]
        with subprocess.Popen(
            command, cwd=ROOT, env=self.env, stdout=subprocess.PIPE, text=True
        ) as demo:
            try:
                assert demo.stdout is not None
                shown = ""
                for line in demo.stdout:
                    shown += line
                    if line == "Ctrl-C ends it.\n":
                        break
                home = re.search(r"its directory is (\S+)\. Try", shown)
                assert home is not None, shown
                self.env["demo"] = home[1]
                yield
            finally:
                demo.send_signal(signal.SIGTERM)

    def enter(self, code: str) -> None:
        """Run code from the root of the project; what it changes of a shell is kept."""
        self.directory = ROOT
        shown = self.run(f'{code}printf "%s\\n" "$PWD" "$PATH"')
        directory, self.env["PATH"] = shown.splitlines()
        self.directory = Path(directory)

    def run(self, code: str) -> str:
        command = ["bash", "-euo", "pipefail", "-c", self.here(code)]
        done = subprocess.run(
            command,
            cwd=self.directory,
            env=self.env,
            capture_output=True,
            check=False,
            timeout=30,
        )
        assert (done.returncode, done.stderr) == (0, b"")
        return done.stdout.decode()


@pytest.fixture(scope="module")
def demo() -> Iterator[Demo]:
    with tempfile.TemporaryDirectory(prefix="is-") as name:
        demo = Demo(Path(name))
        with demo.running(blocks()[0][2]):
            yield demo


def assert_head(shown: str, expected: str) -> None:
    """Compare status line, body, and those header fields that are expected."""
    (head, _, body), (expected_head, _, expected_body) = (
        text.partition("\n\n") for text in (shown, expected)
    )
    status, _, fields = head.partition("\n")
    expected_status, _, expected_fields = expected_head.partition("\n")
    headers = message_from_string(fields)
    assert status == expected_status
    wanted = message_from_string(expected_fields).items()
    assert [(name, headers[name]) for name, _ in wanted] == wanted
    assert body == expected_body


@pytest.mark.parametrize("example", examples(), ids=lambda example: example.heading)
def test_an_example_answers_what_the_document_shows(demo: Demo, example: Example) -> None:
    shown = demo.run(example.code).replace("\r\n", "\n").rstrip("\n")

    expected = demo.here(example.answer).rstrip("\n")
    match example.kind:
        case "http":
            assert_head(shown, expected)
        case "json" if "\n" in expected:
            assert json.loads(shown) == json.loads(expected)
        case "json" | "text":
            assert shown == expected


def test_each_example_has_an_answer_of_a_known_kind() -> None:
    rest = [language for _, language, _ in blocks()[1:]]

    assert set(rest[0::2]) == {"sh"}
    assert set(rest[1::2]) == {"http", "json", "text"}


def test_no_command_stands_outside_an_example() -> None:
    assert "curl -" not in FENCE.sub("", DOCUMENT)


def error_texts() -> set[str]:
    """Return every error text of the package as a pattern: numbers are capital letters."""
    found = set()
    for path in (ROOT / "imageserver").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in SPEAKERS:
                texts = node.args
            elif isinstance(node, ast.Assign | ast.AnnAssign) and TABLES & names_of(node):
                texts = list(ast.walk(node))
            else:
                continue
            found |= {pattern(text) for text in texts}
    return found - {""}


def names_of(node: ast.Assign | ast.AnnAssign) -> set[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def pattern(node: ast.AST) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.escape(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(pattern(part) or "([A-Z]|…)" for part in node.values)
    return ""


def test_every_error_text_is_documented() -> None:
    texts = error_texts()

    assert len(texts) > 30
    missing = {text for text in texts if re.search(f"`{text}`", DOCUMENT) is None}
    assert missing == set()
