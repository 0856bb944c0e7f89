# SPDX-License-Identifier: Apache-2.0
"""The demo shows what it promises, and leaves nothing behind however it ends."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.harness import free_port

RUN = Path(__file__).parents[3] / "scripts" / "run"
MIB = 1 << 20

# What scripts/run writes into the image: (start, length, zero, dirty).
EXTENTS = [
    (0, 1 * MIB, True, False),
    (1 * MIB, 2 * MIB, False, False),
    (3 * MIB, 1 * MIB, True, False),
    (4 * MIB, 65536, False, True),
    (4 * MIB + 65536, 28 * MIB - 65536, True, False),
    (32 * MIB, 4 * MIB, False, False),
    (36 * MIB, 28 * MIB, True, False),
]


@pytest.fixture
def temporary() -> Iterator[Path]:
    """Yield a directory with a short name: a Unix socket's path ends at 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="demo-") as name:
        yield Path(name)


@pytest.fixture
def environ(temporary: Path) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("IMAGESERVER_")}
    own = {"TMPDIR": str(temporary), "IMAGESERVER_WORKERS": "2"}
    # Not the defaults: another demo, or a server in the booted unit, may have those.
    for name in ("BIND", "ADMIN_BIND"):
        own[f"IMAGESERVER_{name}"] = f"127.0.0.1:{free_port()}"
    return inherited | own


def processes_with(temporary: Path) -> list[str]:
    """Return the pids of all that inherited this TMPDIR."""
    marker = f"TMPDIR={temporary}".encode()
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has ended
            if marker in environ.read_bytes().split(b"\0"):
                found.append(environ.parent.name)
    return found


def assert_nothing_is_left(output: str, temporary: Path) -> None:
    assert list(temporary.iterdir()) == []
    assert processes_with(temporary) == []
    port = re.search(r"http://127\.0\.0\.1:([0-9]+)/", output)
    assert port is not None
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(port[1]))) != 0


def test_the_tour_works_as_printed(environ: dict[str, str], temporary: Path) -> None:
    done = subprocess.run([RUN, "--tour"], env=environ, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    answers = [line for line in done.stdout.splitlines() if not line.startswith(("#", "curl "))]
    assert json.dumps({"ok": True, "bytes_written": 5}, separators=(",", ":")) in answers
    assert "hello" in answers
    lists = [json.loads(line) for line in answers if line.startswith("[")]
    assert lists == [
        [{"start": s, "length": n, "zero": z, "hole": z} for s, n, z, _ in EXTENTS],
        [{"start": s, "length": n, "dirty": d, "zero": z} for s, n, z, d in EXTENTS],
    ]
    assert_nothing_is_left(done.stdout, temporary)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_that_the_demo_started(
    number: signal.Signals, environ: dict[str, str], temporary: Path
) -> None:
    # env: a test run that was itself started in the background ignores SIGINT.
    command = ["env", f"--default-signal={number.name.removeprefix('SIG')}", RUN]
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True) as demo:
        assert demo.stdout is not None
        try:
            shown = ""
            for line in demo.stdout:
                shown += line
                if line == "Ctrl-C ends it.\n":
                    break
        finally:
            demo.send_signal(number)
        assert demo.wait() == 128 + number

    assert_nothing_is_left(shown, temporary)


def test_the_tour_works_over_tls(environ: dict[str, str], temporary: Path) -> None:
    pki = temporary / "a & b"
    subprocess.run([RUN.with_name("make-pki"), pki], check=True, capture_output=True)
    environ["IMAGESERVER_TLS_CERT"] = str(pki / "server.crt")
    environ["IMAGESERVER_TLS_KEY"] = str(pki / "server.key")
    done = subprocess.run([RUN, "--tour"], env=environ, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    assert f"curl -fsS --cacert '{pki}/ca.crt' -X OPTIONS https://127.0.0.1:" in done.stdout
    assert "\nhello\n" in done.stdout


def test_a_certificate_that_no_client_trusts_is_said_to_be_that(
    environ: dict[str, str], temporary: Path
) -> None:
    subprocess.run(
        [RUN.with_name("make-pki"), temporary, "elsewhere.example"], check=True, capture_output=True
    )
    environ["IMAGESERVER_TLS_CERT"] = str(temporary / "server.crt")
    environ["IMAGESERVER_TLS_KEY"] = str(temporary / "server.key")
    done = subprocess.run([RUN, "--tour"], env=environ, capture_output=True, text=True, check=False)

    assert done.returncode == 1
    assert "run: clients will not trust the server: curl: (60) " in done.stderr
    assert "no alternative certificate subject name matches" in done.stderr


def test_a_full_directory_is_named(environ: dict[str, str], temporary: Path) -> None:
    """The script asks df; one that says so makes it full."""
    programs = temporary / "programs"
    programs.mkdir()
    (programs / "df").write_text("#!/bin/sh\nprintf 'Avail\\n    3\\n'\n")
    (programs / "df").chmod(0o755)
    environ["PATH"] = f"{programs}:{environ['PATH']}"
    done = subprocess.run([RUN], env=environ, capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"run: {temporary} has 3 MiB free, and the demo needs 20: "
        "name another directory in TMPDIR.\n"
    )
