# SPDX-License-Identifier: Apache-2.0
"""gunicorn's configuration: from the settings to gunicorn's names.

``ImageApplication`` is ``imageserver serve``; the top-level ``gunicorn.conf.py`` has the same
for the ``gunicorn`` command.
"""

import math
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter

from imageserver.process import create
from imageserver.server import preconditions, startup
from imageserver.server.admin_listener import bindable
from imageserver.server.arbiter import ImageArbiter
from imageserver.server.worker import APPLICATION
from imageserver.settings import Settings

#: Longer than the drain timeout: when that is over a worker gives back what it held, and ends.
_MARGIN_SECONDS = 5
#: The worker's loop never blocks: a worker without a heartbeat for so long is stuck.
_STUCK_SECONDS = 60


def configuration(settings: Settings) -> dict[str, Any]:
    """Return what gunicorn is told, by gunicorn's names."""
    addresses = (*settings.bind, *settings.control_address, *settings.admin_bind)
    return {
        "wsgi_app": APPLICATION,
        "worker_class": "imageserver.server.worker.ImageWorker",
        "bind": [bindable(address) for address in addresses],
        "workers": settings.workers,
        "threads": settings.threads,
        "keepalive": int(settings.keepalive),
        "graceful_timeout": math.ceil(settings.drain_timeout) + _MARGIN_SECONDS,
        "timeout": _STUCK_SECONDS,
        "worker_tmp_dir": preconditions.heartbeat_directory(),
        "limit_request_line": 8190,
        "limit_request_fields": 100,
        "limit_request_field_size": 8190,
        # One parser everywhere, whatever happens to be installed.
        "http_parser": "python",
        # No header from anybody changes scheme, path or script name: there is nothing to forward.
        "forwarded_allow_ips": "",
        "forwarder_headers": "",
        "control_socket_disable": True,
        "accesslog": None,
        "errorlog": "-",
        "loglevel": settings.log_level,
        "logconfig_dict": _logging(settings.log_format),
        "proc_name": "imageserver",
        "on_starting": _adoption(settings),
        "when_ready": ImageArbiter.set_socket_modes,
        "on_reload": ImageArbiter.renew,
        "pre_exec": ImageArbiter.run_command_again,
        "post_fork": ImageArbiter.equip,
        "child_exit": ImageArbiter.free_slots,
    }


@cache
def from_environment() -> dict[str, Any]:
    """Return what gunicorn is told where the environment has the settings.

    They are read once per process: in a reload gunicorn executes gunicorn.conf.py again, and
    gets the same.
    """
    return configuration(startup.read_settings())


def _adoption(settings: Settings) -> Callable[[Arbiter], None]:
    def on_starting(arbiter: Arbiter) -> None:
        ImageArbiter.adopt(arbiter, settings)

    return on_starting


def _logging(style: str) -> dict[str, Any]:
    """Return what formats gunicorn's log lines like ours (logging.config.dictConfig)."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"ours": {"()": "imageserver.observability.logs.formatter", "style": style}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "ours"}},
        "loggers": {"gunicorn.error": {"handlers": ["stderr"], "propagate": False}},
        "root": {},
    }


class ImageApplication(BaseApplication):  # type: ignore[misc]  # gunicorn has no types
    """This server as gunicorn runs it without its own command line."""

    app_uri = APPLICATION

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        super().__init__(prog="imageserver")

    def load_config(self) -> None:
        """Tell gunicorn the settings; no file and no ``GUNICORN_CMD_ARGS`` changes them."""
        for name, value in configuration(self._settings).items():
            self.cfg.set(name, value)

    def load(self) -> Any:
        """Return the application for a worker that does not bring its own."""
        return create()

    def run(self) -> None:
        """Serve until stopped; ends the process."""
        arbiter = ImageArbiter(self)
        # What an upgrade executes: with ``python -m`` the script's path would not do.
        arbiter.START_CTX["args"] = [sys.executable, *sys.orig_argv[1:]]
        arbiter.run()
