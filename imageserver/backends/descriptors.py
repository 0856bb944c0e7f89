# SPDX-License-Identifier: Apache-2.0
"""Descriptors, closed come what may; ``runtime/private.py`` has the same for the layers above."""

import os


def close_fd(fd: int) -> None:
    """Close a descriptor. Never fails: Linux has closed it, whatever close(2) says.

    A file system may say so late that what was written is not stored. Whoever promises that it is
    has asked fsync(2), which has said so already.
    """
    try:  # noqa: SIM105 - quicker than contextlib.suppress, several times a request
        os.close(fd)
    except OSError:
        pass
