# SPDX-License-Identifier: Apache-2.0
"""What we count on of gunicorn's master, worker and configuration: see ``test_gunicorn``."""

import inspect
import queue
import runpy
import signal
from pathlib import Path

import pytest
from gunicorn import config
from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.glogging import Logger
from gunicorn.workers.base import Worker

from imageserver.server.arbiter import ImageArbiter
from imageserver.server.configuration import configuration
from imageserver.server.worker import ImageWorker
from imageserver.settings import Settings

ROOT = Path(__file__).parents[3]


def test_the_configuration_names_only_what_gunicorn_knows(configured: config.Config) -> None:
    assert (configured.worker_class, configured.http_parser) == (ImageWorker, "python")
    assert not configured.is_ssl


def test_the_configuration_file_has_all_that_the_server_tells_gunicorn() -> None:
    names = runpy.run_path(str(ROOT / "gunicorn.conf.py"))

    assert configuration(Settings()).keys() <= names.keys()


def test_settings_are_read_once_though_gunicorn_reads_its_file_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = runpy.run_path(str(ROOT / "gunicorn.conf.py"))
    monkeypatch.setenv("IMAGESERVER_WORKERS", "many")

    assert runpy.run_path(str(ROOT / "gunicorn.conf.py"))["bind"] is before["bind"]


def test_the_master_that_gunicorn_has_made_becomes_ours_before_it_binds() -> None:
    arbiter = Arbiter.__new__(Arbiter)
    lines = inspect.getsource(Arbiter.start)

    arbiter.__class__ = ImageArbiter  # which Python refuses for other layouts

    assert isinstance(arbiter, ImageArbiter)
    assert lines.index("self.pid = os.getpid()") < lines.index("self.cfg.on_starting(self)")
    assert lines.index("self.cfg.on_starting(self)") < lines.index("sock.create_sockets(")


def test_the_master_overrides_methods_that_are_there() -> None:
    overridden = {
        *("setup", "spawn_worker", "kill_worker", "manage_workers", "reap_workers"),
        *("murder_workers", "reload", "reexec", "halt", "stop"),
    }

    assert overridden == vars(Arbiter).keys() & {
        name for name, value in vars(ImageArbiter).items() if inspect.isfunction(value)
    }
    for name in overridden:
        ours, theirs = (inspect.signature(getattr(cls, name)) for cls in (ImageArbiter, Arbiter))
        assert list(ours.parameters) == list(theirs.parameters)


def test_the_worker_overrides_methods_that_are_there() -> None:
    used = {
        *("init_process", "init_signals", "load_wsgi", "notify", "run"),
        *("handle_exit", "handle_quit", "handle_abort"),
    }

    assert used <= vars(Worker).keys()


def test_a_worker_has_what_ours_uses_of_it() -> None:
    parameters = list(inspect.signature(Worker.__init__).parameters)

    assert parameters == ["self", "age", "ppid", "sockets", "app", "timeout", "cfg", "log"]
    assert signal.SIGTERM in Worker.SIGNALS


def test_the_master_queues_signals_where_our_workers_look() -> None:
    source = inspect.getsource(Arbiter.__init__)

    assert "self.SIG_QUEUE = queue.SimpleQueue()" in source
    assert hasattr(queue.SimpleQueue, "get_nowait")


def test_a_reload_waits_for_old_workers_no_longer_than_the_graceful_timeout() -> None:
    lines = inspect.getsource(Arbiter.reload)
    hook = lines.index("self.cfg.on_reload(self)")

    assert hook < lines.index("self.manage_workers()")
    assert lines.index("self.manage_workers()") < lines.index(
        "deadline = time.monotonic() + self.cfg.graceful_timeout"
    )


def test_workers_are_counted_in_one_place_only_which_we_override() -> None:
    """``manage_workers``, and what it alone calls; all others ask it, or name a worker."""
    sources = {
        name: inspect.getsource(method)
        for name, method in vars(Arbiter).items()
        if inspect.isfunction(method)
    }
    counting = {name for name, source in sources.items() if "len(self.WORKERS)" in source}
    calling = {name for name, source in sources.items() if "self.spawn_workers()" in source}
    managing = {name for name, source in sources.items() if "self.manage_workers()" in source}
    signalling = {name for name, source in sources.items() if "os.kill(pid, sig)" in source}

    assert counting == {"manage_workers", "spawn_workers"}
    assert calling == {"manage_workers"}
    assert managing == {"run", "reload", "handle_ttin", "handle_ttou"}
    assert signalling == {"kill_worker"}
    assert list(inspect.signature(Arbiter.kill_worker).parameters) == ["self", "pid", "sig"]
    assert "self.kill_worker(pid, sig)" in sources["kill_workers"]
    assert "self.WORKERS[pid] = worker" in sources["spawn_worker"]
    assert "worker.pid = pid" in sources["spawn_worker"]
    assert "while (self.WORKERS or" in sources["stop"]  # ... with those that drain


def test_an_upgrade_executes_the_context_that_a_hook_may_change() -> None:
    lines = inspect.getsource(Arbiter.reexec)

    assert lines.index("self.cfg.pre_exec(self)") < lines.index("os.chdir(self.START_CTX['cwd'])")
    assert "os.execvpe(self.START_CTX[0], self.START_CTX['args'], environ)" in lines
    assert "environ['GUNICORN_PID']" in lines


def test_what_is_executed_in_an_upgrade_is_what_the_master_was_started_by() -> None:
    source = inspect.getsource(Arbiter.__init__)

    assert "self.START_CTX = {" in source
    assert '"args": args' in source


def test_an_application_without_a_command_line_loads_what_it_is_told() -> None:
    """``BaseApplication``, which ``ImageApplication`` is."""
    assert {"load_config", "load", "run", "wsgi"} <= vars(BaseApplication).keys()
    assert "self.load_config()" in inspect.getsource(BaseApplication.do_load_config)


def test_a_log_configuration_takes_the_place_of_gunicorns_own() -> None:
    assert "dictConfig(config)" in inspect.getsource(Logger.setup)
