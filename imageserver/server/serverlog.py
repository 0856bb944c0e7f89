# SPDX-License-Identifier: Apache-2.0
"""gunicorn's own log lines, in the same place and form as the server's."""

from typing import Any

from gunicorn.glogging import Logger

from imageserver.observability import logs
from imageserver.server.hooks import load_settings


class ServerLogger(Logger):  # type: ignore[misc]  # gunicorn has no types
    """gunicorn's logger; ``logger_class`` of ``gunicorn.conf.py``."""

    def setup(self, cfg: Any) -> None:
        """Set the handlers up as gunicorn does, but write lines as our own log does."""
        super().setup(cfg)
        for handler in self.error_log.handlers:
            handler.setFormatter(logs.formatter(load_settings().log_format))
