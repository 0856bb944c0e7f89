# SPDX-License-Identifier: Apache-2.0
"""``python -m imageserver --check | --show-config | --sample-config``: what would the server do?

The last prints ``conf/imageserver.env`` from the settings' declarations.
"""

import argparse
import io
import sys
from dataclasses import MISSING, Field, fields
from typing import Any

from imageserver import __version__
from imageserver.server.hooks import load_settings
from imageserver.server.preconditions import CannotStart, check
from imageserver.settings import Settings, as_text, variable_of

_SAMPLE_HEAD = """\
# SPDX-License-Identifier: Apache-2.0
# The server's settings, printed by `python -m imageserver --sample-config`.
#
# Every setting with its default; uncomment a line to change it. One VARIABLE=value a line, as
# systemd reads it (EnvironmentFile= of imageserver.service). A wrong value stops the server at
# start with a sentence that names the variable. Settings are read once: after a change, restart.
# imageserver.service sets IMAGESERVER_CONFIG_DIR and IMAGESERVER_RUNTIME_DIR; a line here wins.
"""


def main(arguments: list[str] | None = None) -> int:
    """Answer one question; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m imageserver",
        description="Ask about the server's configuration. To serve, run gunicorn.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    question = parser.add_mutually_exclusive_group(required=True)
    question.add_argument(
        "--check", action="store_true", help="prove that the server can start with these settings"
    )
    question.add_argument(
        "--show-config", action="store_true", help="print the settings in force, as variables"
    )
    question.add_argument(
        "--sample-config", action="store_true", help="print every setting with its default"
    )
    asked = parser.parse_args(arguments)
    if asked.sample_config:
        print(sample(), end="")
        return 0
    settings = load_settings()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path need not fit the locale
        sys.stdout.reconfigure(errors="surrogateescape")
    return _show(settings) if asked.show_config else _check(settings)


def sample() -> str:
    """Return an environment file that names every setting and changes none."""
    return _SAMPLE_HEAD + "".join(
        f"\n# {_explained(field)}\n#{variable_of(field.name)}={_default(field)}\n"
        for field in fields(Settings)
    )


def _explained(field: Field[Any]) -> str:
    text = str(field.metadata["help"])
    shown = field.metadata["shown"]
    return f"{text[0].upper()}{text[1:]}" + (f" (default: {shown})" if shown else "")


def _default(field: Field[Any]) -> str:
    """Write the default as its variable takes it; nothing where it depends on the machine."""
    is_plain = field.default is not MISSING and not field.metadata["shown"]
    return as_text(field.default) if is_plain else ""


def _show(settings: Settings) -> int:
    for field in fields(settings):
        print(f"{variable_of(field.name)}={settings.text(field.name)}")
    return 0


def _check(settings: Settings) -> int:
    try:
        warnings = check(settings)
    except CannotStart as exc:
        print(f"imageserver: {exc}", file=sys.stderr)
        return 1
    for warning in warnings:
        print(f"warning: {warning}")
    print("ok")
    return 0


if __name__ == "__main__":
    sys.exit(main())
