# SPDX-License-Identifier: Apache-2.0
"""Settings: what each variable takes, and the one sentence for what it does not."""

import dataclasses
import math
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from imageserver.settings import PREFIX, InvalidSetting, Settings, as_text, variable_of

FIELDS = {field.name: field for field in dataclasses.fields(Settings)}


def _read(name: str, text: str) -> object:
    return getattr(Settings.from_environ({PREFIX + name: text}), name.lower())


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        pytest.param("BIND", "127.0.0.1:0", ("127.0.0.1:0",), id="any-port"),
        pytest.param("BIND", "[::1]:65535", ("[::1]:65535",), id="ipv6"),
        pytest.param("BIND", "host-1.example:80", ("host-1.example:80",), id="host-name"),
        pytest.param("BIND", "unix:/run/a b", ("unix:/run/a b",), id="unix-path"),
        pytest.param("BIND", "unix:@name", ("unix:@name",), id="abstract"),
        pytest.param("BIND", " a:1 , unix:@b,", ("a:1", "unix:@b"), id="several-addresses"),
        pytest.param("WORKERS", "1", 1, id="one-worker"),
        pytest.param("WORKERS", "128", 128, id="most-workers"),
        pytest.param("WORKERS", " 007 ", 7, id="blanks-and-leading-zeros"),
        pytest.param("THREADS", "1024", 1024, id="most-threads"),
        pytest.param("CONFIG_DIR", "/var/lib/x/", "/var/lib/x/", id="trailing-slash"),
        pytest.param(
            "CONFIG_DIR", "/a/link/../c", "/a/link/../c", id="dots-are-left-to-the-kernel"
        ),
        pytest.param("CONFIG_OWNERS", "root", (0,), id="owner-by-name"),
        pytest.param("CONFIG_OWNERS", "0, 54321 ,root", (0, 54321, 0), id="several-owners"),
        pytest.param("RUNTIME_DIR", "/run/x", "/run/x", id="runtime-dir"),
        pytest.param("MAX_READERS", "512", 512, id="most-readers"),
        pytest.param("MAX_WRITERS", "256", 256, id="most-writers"),
        pytest.param("CLIENT_TIMEOUT", "0.1", 0.1, id="shortest-timeout"),
        pytest.param("BACKEND_TIMEOUT", "86400", 86400.0, id="longest-timeout"),
        pytest.param("DRAIN_TIMEOUT", "0", 0.0, id="no-drain"),
        pytest.param("UNREGISTER_TIMEOUT", "4", 4.0, id="unregister-timeout"),
        pytest.param("UNREGISTER_TIMEOUT", "NONE", math.inf, id="no-unregister-timeout"),
        pytest.param("KEEP_REGISTRATIONS", "No", False, id="no-in-capitals"),
        *(
            pytest.param("PUT_FLUSH", text, text in {"yes", "y", "on", "true", "1"}, id=text)
            for text in ("yes", "y", "on", "true", "1", "no", "n", "off", "false", "0")
        ),
        pytest.param("KEEPALIVE", "1.5", 1.5, id="fraction"),
        pytest.param("CHUNK_SIZE", "4096", 4096, id="smallest-chunk"),
        pytest.param("CHUNK_SIZE", "512k", 512 << 10, id="k"),
        pytest.param("CHUNK_SIZE", "2M", 2 << 20, id="m-in-capitals"),
        pytest.param("CHUNK_SIZE", "32MiB", 32 << 20, id="largest-chunk"),
        pytest.param("QUEUE_DEPTH", "64", 64, id="deepest-queue"),
        pytest.param("FILE_ROOTS", "/a, /b/", ("/a", "/b/"), id="file-roots"),
        pytest.param("CORS_ORIGINS", "*", ("*",), id="any-origin"),
        pytest.param(
            "CORS_ORIGINS",
            "HTTPS://Engine:8443, http://[::1]:80,https://b:443",
            ("https://engine:8443", "http://[::1]", "https://b"),
            id="origins-as-browsers-write-them",
        ),
        pytest.param("ADMIN_BIND", "None", (), id="no-admin-listener"),
        pytest.param("ADMIN_BIND", "unix:/a:0", ("unix:/a:0",), id="admin-socket"),
        pytest.param("ADMIN_HOSTS", "A.example, b", ("a.example", "b"), id="admin-hosts"),
        pytest.param("LOG_LEVEL", "WARNING", "warning", id="level-in-capitals"),
    ],
)
def test_a_right_value_is_taken(name: str, text: str, value: object) -> None:
    assert _read(name, text) == value


_INTEGER = "must be a whole number from 1 to "
_SECONDS = "must be a number of seconds from 0.1 to 86400"
_CHUNK = "must be a multiple of 4096 from 4096 to 33554432 bytes"
_ADDRESS = "must be HOST:PORT, unix:/PATH or unix:@NAME"
_PATH = "must be an absolute path"
_OWNER = "must be user names or numbers that exist"


@pytest.mark.parametrize(
    ("name", "text", "right"),
    [
        pytest.param("BIND", "127.0.0.1", _ADDRESS, id="no-port"),
        pytest.param("BIND", ":80", _ADDRESS, id="no-host"),
        pytest.param("BIND", "a:65536", _ADDRESS, id="port-too-large"),
        pytest.param("BIND", "a:-1", _ADDRESS, id="port-negative"),
        pytest.param("BIND", "a:\u0661", _ADDRESS, id="port-arabic"),
        pytest.param("BIND", "::1:80", _ADDRESS, id="ipv6-without-brackets"),
        pytest.param("BIND", "unix:x.sock", _ADDRESS, id="relative-socket"),
        pytest.param("BIND", "unix:", _ADDRESS, id="empty-socket"),
        pytest.param("BIND", "http://a:80", _ADDRESS, id="url"),
        pytest.param("BIND", "a:80,b", _ADDRESS, id="second-address-wrong"),
        pytest.param("BIND", ",", "must be at least one address", id="only-a-comma"),
        pytest.param("ADMIN_BIND", "a:1,b:0", "with a port other than 0", id="admin-any-port"),
        pytest.param("ADMIN_BIND", "none,a:1", _ADDRESS, id="none-and-another"),
        pytest.param("ADMIN_HOSTS", "a.example:54324", "without a port", id="admin-host-port"),
        pytest.param("ADMIN_HOSTS", "*", "without a port", id="admin-any-host"),
        pytest.param("ADMIN_HOSTS", ",", "without a port", id="no-admin-host"),
        pytest.param("WORKERS", "0", _INTEGER + "128", id="no-worker"),
        pytest.param("WORKERS", "129", _INTEGER + "128", id="too-many-workers"),
        pytest.param("WORKERS", "-1", _INTEGER + "128", id="negative"),
        pytest.param("WORKERS", "+1", _INTEGER + "128", id="plus"),
        pytest.param("WORKERS", "1_0", _INTEGER + "128", id="underscore"),
        pytest.param("WORKERS", "2.0", _INTEGER + "128", id="integer-with-fraction"),
        pytest.param("WORKERS", "\u0662", _INTEGER + "128", id="arabic-digit"),
        pytest.param("WORKERS", "1\n2", _INTEGER + "128", id="two-lines"),
        pytest.param("WORKERS", "9" * 5000, _INTEGER + "128", id="5000-digits"),
        pytest.param("THREADS", "many", _INTEGER + "1024", id="word"),
        pytest.param("MAX_READERS", "513", _INTEGER + "512", id="too-many-readers"),
        pytest.param("MAX_WRITERS", "257", _INTEGER + "256", id="too-many-writers"),
        pytest.param("QUEUE_DEPTH", "65", _INTEGER + "64", id="queue-too-deep"),
        pytest.param("CLIENT_TIMEOUT", "0", _SECONDS, id="no-time"),
        pytest.param("CLIENT_TIMEOUT", "60s", _SECONDS, id="unit"),
        pytest.param("CLIENT_TIMEOUT", "1e3", _SECONDS, id="exponent"),
        pytest.param("CLIENT_TIMEOUT", "inf", _SECONDS, id="infinite"),
        pytest.param("CLIENT_TIMEOUT", "nan", _SECONDS, id="nan"),
        pytest.param("BACKEND_TIMEOUT", "86400.1", _SECONDS, id="too-long"),
        pytest.param("BACKEND_TIMEOUT", ".5", _SECONDS, id="no-leading-zero"),
        pytest.param("DRAIN_TIMEOUT", "-1", "seconds from 0 to 604800", id="negative-seconds"),
        pytest.param("UNREGISTER_TIMEOUT", "inf", "to 3.1536e+07, or none", id="no-number"),
        pytest.param("KEEP_REGISTRATIONS", "maybe", "must be yes or no", id="neither-yes-nor-no"),
        pytest.param("KEEPALIVE", "0.5", "seconds from 1 to 86400", id="keepalive-too-short"),
        pytest.param("CHUNK_SIZE", "0", _CHUNK, id="empty-chunk"),
        pytest.param("CHUNK_SIZE", "5000", _CHUNK, id="not-a-multiple"),
        pytest.param("CHUNK_SIZE", "33m", _CHUNK, id="chunk-too-large"),
        pytest.param("CHUNK_SIZE", "1t", _CHUNK, id="unit-unknown"),
        pytest.param("CHUNK_SIZE", "1 m", _CHUNK, id="blank-before-unit"),
        pytest.param("CHUNK_SIZE", "1mb", _CHUNK, id="decimal-unit"),
        pytest.param("CHUNK_SIZE", "9" * 5000, _CHUNK, id="chunk-5000-digits"),
        pytest.param("CONFIG_DIR", "transfers", _PATH, id="relative-path"),
        pytest.param("CONFIG_DIR", "~/transfers", _PATH, id="home"),
        pytest.param("RUNTIME_DIR", "./run", _PATH, id="dot-path"),
        pytest.param("FILE_ROOTS", "/a,b", _PATH, id="second-path-relative"),
        pytest.param("CONFIG_OWNERS", "no-such-user-here", _OWNER, id="unknown-user"),
        pytest.param("CONFIG_OWNERS", "root,-1", _OWNER, id="negative-owner"),
        pytest.param("LOG_LEVEL", "trace", "debug or info or warning or error", id="level"),
    ],
)
def test_a_wrong_value_is_one_sentence_with_the_variable_and_what_would_be_right(
    name: str, text: str, right: str
) -> None:
    _assert_refused(name, text, right)


def _assert_refused(name: str, text: str, right: str) -> None:
    with pytest.raises(InvalidSetting) as failure:
        _read(name, text)

    sentence = str(failure.value)
    assert sentence.startswith(f"{PREFIX}{name}={text!r} is wrong: it must be ")
    assert right in sentence
    assert sentence.endswith(".")
    assert "\n" not in sentence


@pytest.mark.parametrize(
    ("name", "text", "right"),
    [
        pytest.param("CONFIG_OWNERS", "1" * 5000, "", id="owner-5000-digits-ends-in-ValueError"),
        pytest.param("CONFIG_OWNERS", "9" * 30, "", id="owner-beyond-any-uid"),
        pytest.param("CONFIG_OWNERS", ",", "", id="no-owner-at-all"),
        pytest.param("FILE_ROOTS", ",", "", id="no-root-at-all-reads-as-any"),
        pytest.param("CORS_ORIGINS", ",", "origins such as", id="no-origin-at-all"),
        pytest.param("CORS_ORIGINS", "engine", "origins such as", id="origin-without-scheme"),
        pytest.param("CORS_ORIGINS", "https://a/", "origins such as", id="origin-with-path"),
        pytest.param("CORS_ORIGINS", "https://a,*", "origins such as", id="any-among-origins"),
        pytest.param("CORS_ORIGINS", "null", "origins such as", id="null-origin"),
        pytest.param("CHUNK_SIZE", "4096ib", _CHUNK, id="ib-without-a-prefix"),
        pytest.param("CHUNK_SIZE", "512\u212a", _CHUNK, id="kelvin-sign"),
        pytest.param("BIND", "unix:/" + "x" * 107, "", id="socket-path-too-long"),
    ],
)
def test_a_value_that_only_looks_right_is_refused(name: str, text: str, right: str) -> None:
    _assert_refused(name, text, right)


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("text", ["", " \t"], ids=["empty", "blank"])
def test_an_empty_variable_counts_as_absent(name: str, text: str) -> None:
    assert Settings.from_environ({variable_of(name): text}) == Settings()


def test_settings_are_read_together() -> None:
    found = Settings.from_environ({PREFIX + "WORKERS": "3", PREFIX + "THREADS": "5", "HOME": "/"})

    assert found == Settings(workers=3, threads=5)


@pytest.mark.parametrize("name", FIELDS)
def test_a_default_written_as_text_reads_back(name: str) -> None:
    default = getattr(Settings(), name)

    assert getattr(Settings.from_environ({variable_of(name): as_text(default)}), name) == default


@pytest.mark.parametrize("text", ["none", "NONE", ",", "0", "-"])
@pytest.mark.parametrize("name", FIELDS)
def test_every_value_written_as_text_reads_back(name: str, text: str) -> None:
    try:
        settings = Settings.from_environ({variable_of(name): text})
    except InvalidSetting:
        return
    value = getattr(settings, name)

    assert getattr(Settings.from_environ({variable_of(name): settings.text(name)}), name) == value


@pytest.mark.parametrize("name", FIELDS)
def test_each_setting_has_a_line_of_help(name: str) -> None:
    text = FIELDS[name].metadata["help"]

    assert (text.strip(), text.count("\n")) == (text, 0)
    assert text


@pytest.mark.parametrize("name", [n for n, f in FIELDS.items() if callable(f.default_factory)])
def test_a_computed_default_is_documented(name: str) -> None:
    assert FIELDS[name].metadata["shown"]


@hypothesis_settings(max_examples=200, deadline=None)
@given(size=st.integers(1, (32 << 20) // 4096).map(lambda pages: pages * 4096))
def test_any_size_written_as_text_reads_back(size: int) -> None:
    assert _read("CHUNK_SIZE", as_text(size)) == size


@pytest.mark.parametrize(
    "text",
    ["0.25", "604800", "123456.5", "0.000001"],
)
def test_seconds_written_as_text_read_back(text: str) -> None:
    assert _read("DRAIN_TIMEOUT", as_text(_read("DRAIN_TIMEOUT", text))) == float(text)


@hypothesis_settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from([n for n in FIELDS if n != "config_owners"]),
    text=st.text(alphabet="0159kmg.,:/-@[]unixa \u0661", max_size=12)
    | st.text(st.characters(exclude_characters="\0"), max_size=12),
)
def test_any_text_is_a_value_or_a_sentence(name: str, text: str) -> None:
    try:
        value = _read(name.upper(), text)
    except InvalidSetting as failure:
        assert variable_of(name) in str(failure)  # noqa: PT017 - either way is right
    else:
        default = getattr(Settings(), name)
        assert isinstance(value, (int, type(None)) if default is None else type(default))


def test_there_are_at_least_two_workers_and_one_for_each_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts = []
    for cpus in (1, 2, 6):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cpus=cpus: set(range(cpus)))
        counts.append(Settings().workers)

    assert counts == [2, 2, 6]


def test_the_default_of_workers_is_one_that_may_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(200)))

    assert Settings().workers <= 128


def test_root_and_the_server_own_transfers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 54321)

    assert Settings().config_owners == (0, 54321)


def _usable(monkeypatch: pytest.MonkeyPatch, *directories: str) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    monkeypatch.setattr(os.path, "isdir", lambda path: path in directories)
    monkeypatch.setattr(os, "access", lambda path, _: path in directories)


def test_the_runtime_directory_is_under_run_where_that_is_usable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1")
    _usable(monkeypatch, "/run/imageserver", "/run/user/1")

    assert Settings().runtime_dir == "/run/imageserver"


def test_else_the_runtime_directory_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1")
    _usable(monkeypatch, "/run/user/1")

    assert Settings().runtime_dir == "/run/user/1/imageserver"


@pytest.mark.parametrize(
    "usable",
    [pytest.param([], id="nothing-usable"), pytest.param(["/"], id="root")],
)
def test_else_the_runtime_directory_is_one_per_user_under_the_temporary_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, usable: list[str]
) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    _usable(monkeypatch, *usable)

    assert Settings().runtime_dir == f"{tmp_path}/imageserver-54321"


@pytest.mark.parametrize(
    ("bind", "advertised"),
    [
        pytest.param("a:1", None, id="none"),
        pytest.param("a:1,unix:/run/x", "/run/x", id="path"),
        pytest.param("unix:@name", "\0name", id="abstract"),
        pytest.param("unix:/a,unix:/b", "/a", id="first-of-two"),
    ],
)
def test_the_unix_socket_of_bind_is_the_one_advertised(bind: str, advertised: str | None) -> None:
    assert Settings.from_environ({PREFIX + "BIND": bind}).unix_socket == advertised
