# SPDX-License-Identifier: Apache-2.0
"""``python -m imageserver --check | --show-config``: what would the server do, and can it?"""

import argparse
import sys
from dataclasses import fields

from imageserver import __version__
from imageserver.server.hooks import CannotStart, check, load_settings
from imageserver.settings import Settings, as_text, variable_of


def main(arguments: list[str] | None = None) -> int:
    """Run one of the two questions; return the exit status."""
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
    asked = parser.parse_args(arguments)
    settings = load_settings()
    return _show(settings) if asked.show_config else _check(settings)


def _show(settings: Settings) -> int:
    for field in fields(settings):
        print(f"{variable_of(field.name)}={as_text(getattr(settings, field.name))}")
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
