# SPDX-License-Identifier: Apache-2.0
"""What a log record says."""

import logging

from imageserver.core.entry import FIELDS


def told(record: logging.LogRecord) -> tuple[str, dict[str, object]]:
    """Return a record's message and its fields."""
    return record.getMessage(), dict(getattr(record, FIELDS, {}))
