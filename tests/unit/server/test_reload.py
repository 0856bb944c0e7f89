# SPDX-License-Identifier: Apache-2.0
"""A reload in the master: checked before it stops anyone, and never the master's end."""

import os
import shutil
import ssl
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from gunicorn.arbiter import Arbiter
from gunicorn.config import Config

from imageserver.server.arbiter import ImageArbiter
from imageserver.transfers.fileage import FileAge, file_age
from tests.unit.masters import begin

pytestmark = pytest.mark.usefixtures("place")


@pytest.mark.parametrize("fails", [False, True])
def test_a_reload_does_not_wait_and_leaves_the_timeout_as_it_was(
    arbiter: ImageArbiter, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    waits = []

    def reload(arbiter: ImageArbiter) -> None:
        arbiter.renew()
        waits.append(arbiter.cfg.graceful_timeout)
        if fails:
            raise RuntimeError("bug")

    monkeypatch.setattr(Arbiter, "reload", reload)
    arbiter.cfg.set("graceful_timeout", 605)
    begin(arbiter)
    arbiter.reload()

    assert (waits, arbiter.cfg.graceful_timeout) == ([0], 605)


def _remove_runtime(place: Path) -> None:
    shutil.rmtree(place / "run")


def _replace_runtime(place: Path) -> None:
    (place / "run").rename(place / "away")
    (place / "run").mkdir(0o700)


def _open_config(place: Path) -> None:
    (place / "transfers").chmod(0o777)


@pytest.mark.parametrize("spoil", [_remove_runtime, _replace_runtime, _open_config])
def test_a_reload_that_could_not_start_workers_stops_none(
    place: Path,
    arbiter: ImageArbiter,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    spoil: Callable[[Path], None],
) -> None:
    reloads: list[str] = []
    monkeypatch.setattr(Arbiter, "reload", lambda _: reloads.append("reload"))
    begin(arbiter)
    arbiter.reload()
    caplog.clear()
    spoil(place)

    arbiter.reload()

    assert reloads == ["reload"]
    (record,) = caplog.records
    assert record.getMessage().startswith("reload refused, the workers go on: IMAGESERVER_")


def test_a_reload_does_not_mind_a_table_that_is_damaged_for_a_moment(
    place: Path, arbiter: ImageArbiter, monkeypatch: pytest.MonkeyPatch
) -> None:
    reloads: list[str] = []
    monkeypatch.setattr(Arbiter, "reload", lambda _: reloads.append("reload"))
    begin(arbiter)
    with (place / "run" / "slots").open("r+b") as file:
        file.write(bytes(64))

    arbiter.reload()

    assert reloads == ["reload"]


@pytest.mark.parametrize("error", [SystemExit(1), RuntimeError("bug"), OSError(12, "no memory")])
def test_a_reload_that_fails_half_way_leaves_the_master_as_it_was(
    arbiter: ImageArbiter,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: BaseException,
) -> None:
    before = arbiter.cfg

    def fail(arbiter: ImageArbiter) -> None:
        arbiter.app.cfg = Config()  # what gunicorn does first
        raise error

    monkeypatch.setattr(Arbiter, "reload", fail)
    begin(arbiter)
    arbiter.reload()

    assert (arbiter.app.cfg, arbiter.cfg) == (before, before)
    assert caplog.records[-1].getMessage() == "reload failed, the workers go on"


def test_a_certificate_that_does_not_fit_leaves_the_old_one_and_the_reload_goes_on(
    arbiter: ImageArbiter,
) -> None:
    begin(arbiter)
    arbiter.tls = old = ssl.create_default_context()
    arbiter.settings = replace(arbiter.settings, tls_cert="/nowhere")

    arbiter.renew()

    assert arbiter.tls is old


def test_workers_inherit_what_the_master_has_noted_of_the_clock(
    arbiter: ImageArbiter, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted: list[FileAge] = []

    def look(ages: FileAge) -> None:
        noted.append(ages)

    monkeypatch.setattr(FileAge, "look", look)
    begin(arbiter)
    arbiter._num_workers = 0

    arbiter.manage_workers()

    assert noted == [file_age()]
    assert arbiter.process.catalogue._ages is noted[0]


def test_a_reload_whose_workers_could_take_no_slot_stops_nobody(
    place: Path,
    arbiter: ImageArbiter,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    reloads: list[object] = []
    monkeypatch.setattr(Arbiter, "reload", reloads.append)
    begin(arbiter)
    os.truncate(place / "run/slots", 0)
    arbiter.reload()

    [record] = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "reload refused, the workers go on: no worker can take a slot" in record.getMessage()
    assert (reloads, record.exc_info) == ([], None)
