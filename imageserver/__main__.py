# SPDX-License-Identifier: Apache-2.0
"""Starts ``imageserver``: imports nothing before Ctrl-C is taken care of."""

import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from imageserver.client import interrupts

if TYPE_CHECKING:
    from imageserver.server.commandline import Share


def main() -> int:
    """Run the command line; return the exit status."""
    return interrupts.run("imageserver", load)


def load() -> Callable[[], int]:
    """Import all commands; return what runs one."""
    from imageserver.client.commands import outputs  # noqa: PLC0415 - after Ctrl-C, as above

    outputs.open_closed()
    from imageserver.server import commandline  # noqa: PLC0415 - it imports the rest

    return partial(commandline.main, share_command())


def share_command() -> "Share":
    """Return the command that stands above the server, and is passed to it."""
    from imageserver.server import commandline  # noqa: PLC0415 - as above
    from imageserver.server.startup import read_settings  # noqa: PLC0415
    from imageserver.sharing import command  # noqa: PLC0415

    server = command.Server(read_settings, commandline.serve)
    return commandline.Share(command.add_arguments, lambda parsed: command.share(parsed, server))


if __name__ == "__main__":
    sys.exit(main())
