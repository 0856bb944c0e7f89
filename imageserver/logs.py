# SPDX-License-Identifier: Apache-2.0
"""Where the log goes: standard error, one line an event; journald adds its own time stamps."""

import logging
import os
import sys

_FORMAT = "[%(process)d] [%(levelname)s] %(message)s"


def configure(level: str) -> None:
    """Send what the package logs to standard error; calling it again changes the level only."""
    logger = logging.getLogger("imageserver")
    logger.setLevel(level.upper())
    logger.propagate = False
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        # systemd sets JOURNAL_STREAM for services whose output it collects (systemd.exec(5)).
        stamp = "" if "JOURNAL_STREAM" in os.environ else "[%(asctime)s] "
        handler.setFormatter(logging.Formatter(stamp + _FORMAT, "%Y-%m-%d %H:%M:%S %z"))
        logger.addHandler(handler)
