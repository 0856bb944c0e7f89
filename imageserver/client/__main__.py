# SPDX-License-Identifier: Apache-2.0
"""Starts ``imagectl``, or says what must be installed first: nothing else is imported before."""

import os
import sys


def main() -> int:
    """Run the command line; return the exit status."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:  # noqa: PLR2004 - stderr's
        os.set_inheritable(fd, True)  # noqa: FBT003 # closed: no file of ours may get its number
    os.close(fd)
    try:
        from imageserver.client import cli  # noqa: PLC0415 - may be missing what it needs
    except ModuleNotFoundError as exc:
        if exc.name is None or exc.name.partition(".")[0] not in {"click", "rich", "urllib3"}:
            raise
        print(  # noqa: T201 - its answer
            f"imagectl: {exc.name} is missing; in imageserver's source, pip install '.[client]' "
            "or scripts/install --with-client brings it.",
            file=sys.stderr,
        )
        return 5
    cli.take_outputs()
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
