# SPDX-License-Identifier: Apache-2.0
"""What is served to Apache CloudStack's agent, by the words that it says."""

import argparse
import os
import socket
from pathlib import Path

import pytest

from imageserver.server import cloudstack
from imageserver.server.preconditions import check
from imageserver.settings import Settings, variable_of

SAMPLE = Path(__file__).parents[3] / "conf" / "cloudstack" / "image-server.env"
#: As its agent writes them.
LISTEN = ["--listen", "192.0.2.7", "--port", "54322"]
TLS = ["--tls-enabled", "--tls-cert-file", "/etc/a.crt", "--tls-key-file", "/etc/a.key"]


def flags(*words: str) -> dict[str, str] | None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    cloudstack.add_flags(parser)
    return cloudstack.flags_in(parser.parse_args(words))


def settings(*words: str) -> Settings:
    found = flags(*words)
    assert found is not None
    return cloudstack.settings_of(found)


@pytest.fixture
def control(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "er" / "image-server.sock"


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ([], None),
        (LISTEN, {"bind": "192.0.2.7:54322"}),
        (["--port", "0"], {"bind": "127.0.0.1:0"}),
        (["--listen", "::"], {"bind": "[::]:54322"}),
        (["--listen", "[fe80::1]"], {"bind": "[fe80::1]:54322"}),
        (["--listen", "host.example"], {"bind": "host.example:54322"}),
        (
            LISTEN + TLS,
            {"bind": "192.0.2.7:54322", "tls_cert": "/etc/a.crt", "tls_key": "/etc/a.key"},
        ),
        (LISTEN + TLS[1:], {"bind": "192.0.2.7:54322"}),
        (
            ["--control-socket", "/run/x.sock"],
            {"bind": "127.0.0.1:54322", "control_socket": "/run/x.sock"},
        ),
    ],
    ids=["none", "listen", "port", "ipv6", "brackets", "name", "tls", "files-alone", "control"],
)
def test_the_agents_words_are_settings(words: list[str], found: dict[str, str] | None) -> None:
    assert flags(*words) == found


@pytest.mark.parametrize(
    "words",
    [["--port", "65536"], ["--port", "+1"], ["--port", ""], ["--listen", "a b"], ["--listen", ""]],
    ids=" ".join,
)
def test_words_that_are_no_address_are_refused(words: list[str]) -> None:
    with pytest.raises(argparse.ArgumentError):
        flags(*words)


@pytest.mark.parametrize("words", [TLS[:1], TLS[:3], TLS[:1] + TLS[3:]], ids=" ".join)
def test_tls_without_its_files_is_refused(words: list[str]) -> None:
    with pytest.raises(ValueError, match="--tls-enabled wants --tls-cert-file and --tls-key-file"):
        flags(*words)


def test_the_agent_gets_what_it_expects() -> None:
    found = settings(*LISTEN)
    home = "/var/run/cloudstack/image-server"

    assert found == Settings(
        bind=("192.0.2.7:54322",),
        control_socket=f"{home}.sock",
        config_dir=f"{home}/transfers",
        runtime_dir=f"{home}/state",
        admin_bind=(f"unix:{home}/admin.sock",),
        max_readers=48,
        max_writers=48,
        max_readers_per_image=4,
        max_writers_per_image=4,
        drain_timeout=5.0,
        unregister_timeout=4.0,
        keep_registrations=False,
    )


def test_the_workers_have_threads_for_every_slot() -> None:
    found = settings(*LISTEN)

    assert found.max_readers + found.max_writers < 2 * found.threads  # of the fewest workers


def test_the_environment_wins_over_that_and_the_command_line_over_both(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("IMAGESERVER_BIND", "unix:/elsewhere")
    monkeypatch.setenv("IMAGESERVER_MAX_READERS", "7")
    monkeypatch.setenv("IMAGESERVER_MAX_WRITERS", " ")
    monkeypatch.setenv("IMAGESERVER_CONTROL_SOCKET", "/run/other")
    found = settings(*LISTEN)

    assert (found.bind, found.max_readers, found.max_writers) == (("192.0.2.7:54322",), 7, 48)
    assert (found.control_socket, found.runtime_dir) == ("/run/other", "/run/other.d/state")


def test_the_sample_names_each_of_these_defaults() -> None:
    lines = SAMPLE.read_text(encoding="utf-8").splitlines()
    shown = dict(line[1:].split("=", 1) for line in lines if line.startswith("#IMAGESERVER_"))
    found = settings(*LISTEN)

    names = [*cloudstack.DEFAULTS, "config_dir", "runtime_dir", "admin_bind"]
    assert shown == {variable_of(name): found.text(name) for name in names}
    assert [line for line in lines if line and not line.startswith("#")] == []


def test_missing_directories_are_made_for_nobody_else(control: Path) -> None:
    found = settings("--control-socket", str(control), "--port", "0")
    old = os.umask(0)
    try:
        for _ in range(2):
            cloudstack.prepare(found)
    finally:
        os.umask(old)

    assert control.parent.stat().st_mode & 0o777 == 0o755
    home = control.with_suffix("")
    assert [path.stat().st_mode & 0o777 for path in (home, home / "transfers")] == [0o700, 0o700]
    assert check(found) == []


@pytest.mark.parametrize("stale", ["file", "dangling link", "socket"])
def test_what_a_dead_server_has_left_at_the_control_socket_is_no_obstacle(
    control: Path, stale: str
) -> None:
    control.parent.mkdir(parents=True)
    if stale == "file":
        control.touch()
    elif stale == "socket":
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(control))
    else:
        control.symlink_to("nowhere")
    found = settings("--control-socket", str(control), "--port", "0")
    cloudstack.prepare(found)

    assert check(found) == []
    assert os.path.lexists(control) == (stale == "socket")  # gunicorn replaces those


@pytest.mark.parametrize("in_the_way", ["image-server", "image-server/transfers", ""])
def test_a_place_that_cannot_be_had_is_one_sentence(control: Path, in_the_way: str) -> None:
    blocked = control.parent / in_the_way if in_the_way else control.parent
    blocked.parent.mkdir(parents=True, mode=0o700)
    blocked.touch()

    with pytest.raises(SystemExit) as raised:
        cloudstack.prepare(settings("--control-socket", str(control)))

    assert str(raised.value).startswith(f"imageserver: {blocked} ")
    assert str(raised.value).endswith(".")
