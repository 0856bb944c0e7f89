# SPDX-License-Identifier: Apache-2.0
"""Load on an image server, every answer checked; for locust. docs/load-tests.md explains it.

    .venv/bin/locust -f scripts/locustfile.py --host http://127.0.0.1:54323 --read "ID=FILE"

Nothing is written unless --write or --config-dir is given. ``scripts/load`` brings a server and
images of its own.
"""

import sys
import time
from typing import Any

import gevent
from loading import parameters, report
from loading.control import ControlProgram
from loading.run import NotReady, Run
from loading.users import BackupReader, LoadBalancer, LoadUser
from loading.writers import RestoreWriter
from locust import events
from locust.runners import LocalRunner

#: Longer than a task: a run that ends lets its users finish.
_STOP_SECONDS = 60

__all__ = ["BackupReader", "ControlProgram", "LoadBalancer", "RestoreWriter"]  # locust's to find


@events.init_command_line_parser.add_listener
def _add_options(parser: Any) -> None:  # noqa: ANN401 - locust's
    parameters.add_options(parser)


@events.init.add_listener
def _choose_users(environment: Any, **_more: object) -> None:  # noqa: ANN401 - locust's
    """Leave only the users that the parameters have work for."""
    if not isinstance(environment.runner, LocalRunner):
        sys.exit("locustfile: only one process: --master, --worker and --processes do not work")
    try:
        asked = parameters.parse(environment.parsed_options)
    except ValueError as exc:
        sys.exit(f"locustfile: {exc}")
    RestoreWriter.fixed_count = len(asked.write)
    present = {
        LoadBalancer: True,
        BackupReader: bool(asked.read or asked.write),
        RestoreWriter: bool(asked.write),
        ControlProgram: bool(asked.config_dir),
    }
    environment.user_classes[:] = [user for user in environment.user_classes if present[user]]
    environment.stop_timeout = environment.stop_timeout or _STOP_SECONDS
    environment.load = asked
    if environment.parsed_options.headless:
        # Before the time of the run begins: on a busy machine it could be up by then.
        try:
            LoadUser.run_of = _run(environment)
        except NotReady as exc:
            sys.exit(f"locustfile: {exc}")


@events.test_start.add_listener
def _look(environment: Any, **_more: object) -> None:  # noqa: ANN401 - locust's
    """Look at the server and its images; without them there is no run."""
    if environment.parsed_options.headless and LoadUser.run_of:
        return  # there is one run, and its images have been looked at
    LoadUser.run_of = None
    try:
        LoadUser.run_of = _run(environment)
    except NotReady as exc:
        sys.stderr.write(f"locustfile: {exc}\n")
        environment.process_exit_code = 1
        gevent.spawn(environment.runner.quit)


def _run(environment: Any) -> Run:  # noqa: ANN401 - locust's
    return Run(environment.host or "", environment.load, environment.events.request.fire)


@events.test_stop.add_listener
def _judge(**_more: object) -> None:
    """Judge the refusals that are left."""
    if LoadUser.run_of:
        LoadUser.run_of.reporter.close()


@events.quitting.add_listener
def _report(environment: Any, **_more: object) -> None:  # noqa: ANN401 - locust's
    """Print the table, and fail for anything unexpected, nothing done included."""
    run, stats = LoadUser.run_of, environment.stats
    if run is None:  # nothing was done, so nothing is proved
        environment.process_exit_code = 1
        return
    run.reporter.close()
    seconds = (stats.last_request_timestamp or time.time()) - stats.start_time
    rows = report.rows(stats, seconds)
    started = environment.runner.target_user_classes_count
    users = {user.kind for user in environment.user_classes if started.get(user.__name__)}
    found = report.failures(stats, environment.runner.exceptions.values())
    found += report.idle(rows, users | run.present)
    sys.stdout.write(f"\n{report.table(rows)}\n")
    if found:
        sys.stdout.write("\nunexpected:\n" + "\n".join(found[:20]) + "\n")
    sys.stdout.flush()
    environment.process_exit_code = 1 if found else 0
