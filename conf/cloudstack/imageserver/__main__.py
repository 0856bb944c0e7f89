# SPDX-License-Identifier: Apache-2.0
"""Runs the installed imageserver where Apache CloudStack's agent looks for its own.

    PARENT/imageserver/          this package, put here by scripts/install --cloudstack
    PARENT/image-server.env      settings, as systemd's EnvironmentFile= has them

The agent starts ``/usr/bin/python3 -m imageserver --listen IP --port N ...`` in PARENT
(docs/clients.md). That Python may be older than the server's and see none of its packages: so this
takes 3.6 and the standard library, and becomes the server, which gets the words as they are.
"""

import os
import re
import sys

#: Where scripts/install puts what starts next.
CURRENT = "/opt/imageserver/current"
SETTINGS = "image-server.env"


def variables(path: str) -> dict:
    """Return the variables that a file sets; none where there is no file.

    Raises:
        ValueError: a line is neither VARIABLE=value, nor empty, nor a comment.
        OSError: the file cannot be read.
    """
    found = {}
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except FileNotFoundError:
        return found
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text[0] in "#;":
            continue
        match = re.match(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)$", text)
        if match is None:
            raise ValueError(f"line {number} is not VARIABLE=value")
        value = match.group(2).strip()
        if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
            value = value[1:-1]
        found[match.group(1)] = value
    return found


def main() -> None:
    """Become the installed server, or end with one sentence."""
    parent = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    settings = os.path.join(parent, SETTINGS)
    command = os.path.join(CURRENT, "bin", "imageserver")
    try:
        os.environ.update(variables(settings))
    except (OSError, ValueError) as exc:
        sys.exit("imageserver: {}: {}.".format(settings, getattr(exc, "strerror", None) or exc))
    try:
        os.chdir(os.path.realpath(CURRENT))  # scripts/install keeps a release that is in use
        os.execv(command, [command, *sys.argv[1:]])  # noqa: S606 - no shell is wanted
    except OSError as exc:
        sys.exit(
            f"imageserver: {command} does not start ({exc.strerror}); "
            "scripts/install puts it there."
        )


if __name__ == "__main__":
    main()
