# SPDX-License-Identifier: Apache-2.0
"""/readyz: what makes a server unready, in which words, and until when."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.harness import Server, free_port, wait_until
from tests.system.watching import Admin, watched


@pytest.fixture(scope="module")
def server(workplace: Path, tcp: Admin, unix: Admin, big: dict[str, str]) -> Iterator[Server]:
    with watched(workplace, big, tcp, unix) as running:
        yield running


def _remove_config(server: Server) -> Callable[[], object]:
    away = server.config.rename(server.config.with_name("away"))
    return lambda: away.rename(server.config)


def _distrust_config(server: Server) -> Callable[[], object]:
    server.config.chmod(0o777)
    return lambda: server.config.chmod(0o700)


def _remove_runtime(server: Server) -> Callable[[], object]:
    away = server.runtime.rename(server.runtime.with_name("gone"))
    return lambda: away.rename(server.runtime)


def _replace_table(server: Server) -> Callable[[], object]:
    table, away = server.runtime / "slots", server.runtime / "slots.away"
    table.rename(away)
    table.write_bytes(away.read_bytes())
    return lambda: away.rename(table)


@pytest.mark.parametrize(
    ("spoil", "failed"),
    [
        pytest.param(
            _remove_config,
            {"config_dir": "config cannot be used: No such file or directory"},
            id="config-removed",
        ),
        pytest.param(
            _distrust_config,
            {"config_dir": "config can be written by group or others (mode 0777)"},
            id="config-open-to-others",
        ),
        pytest.param(
            _remove_runtime,
            {
                "runtime_dir": "run: No such file or directory",
                "slot_table": "run is another, or gone",
            },
            id="runtime-removed",
        ),
        pytest.param(
            _replace_table, {"slot_table": "run is another, or gone"}, id="table-replaced"
        ),
    ],
)
def test_a_server_that_cannot_work_is_not_ready_until_it_can(server, admin, spoil, failed):
    repair = spoil(server)
    try:
        answer = admin.ask("/readyz")
        assert admin.ask("/healthz").status == 200
    finally:
        repair()
    problems = {found["check"]: found["problem"] for found in answer.json["failed"]}
    assert (answer.status, answer.json["status"]) == (503, "not ready")
    assert problems.keys() == failed.keys()
    assert [words for name, words in failed.items() if not problems[name].endswith(words)] == []
    assert admin.ask("/readyz").body == b'{"status":"ready","failed":[]}'


def test_a_table_that_was_cut_short_makes_a_server_unready(home):
    admin = Admin(free_port())
    with Server(home, workers=1, admin_bind=admin.bind) as server:
        table = server.runtime / "slots"
        os.truncate(table, table.stat().st_size - 1)  # less by a page would kill the worker
        answer = admin.ask("/readyz")
    problem = f"the file slots in {server.runtime} was cut short"
    assert (answer.status, answer.json["failed"]) == (
        503,
        [{"check": "slot_table", "problem": problem}],
    )


def test_a_damaged_header_makes_a_server_unready_until_a_worker_has_mended_it(server, unix):
    table = server.runtime / "slots"

    def damaged() -> Any:  # again and again, for each worker mends it every second
        with table.open("rb+") as file:
            file.write(b"\xff" * 8)
        answer = unix.ask("/readyz")
        return answer if answer.status == 503 else None

    assert wait_until(damaged).json["failed"] == [
        {"check": "slot_table", "problem": "its header is damaged"}
    ]
    wait_until(lambda: unix.ask("/readyz").status == 200)
