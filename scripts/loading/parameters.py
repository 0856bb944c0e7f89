# SPDX-License-Identifier: Apache-2.0
"""What a run is told: options of locust's command line, each an environment variable as well.

Without ``--read`` and ``--write`` there are only probes of the server itself. Nothing is written,
and no transfer made, unless asked for.
"""

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Readable:
    """An image to read; with files that tell what it contains, and contained before."""

    id: str
    content: Path | None = None
    base: Path | None = None


@dataclass(frozen=True, slots=True)
class Parameters:
    """What a run may use."""

    read: tuple[Readable, ...] = ()
    write: tuple[str, ...] = ()
    config_dir: Path | None = None
    control_socket: Path | None = None
    others: bool = False
    """Others use the server, too: their requests may explain any refusal."""


_OPTIONS = {
    "read": "images to read, blanks between: ID, ID=FILE to compare, ID=FILE=BASE for dirty, too",
    "write": "images to OVERWRITE, by id, blanks between; nobody else may write to them",
    "config-dir": ("make and delete transfer files here, copies of those of --read, read-only"),
    "control-socket": "register and unregister the same here (with --config-dir)",
    "others": "the server has other clients: take every 409 and 503 as explained",
}


def add_options(parser: Any) -> None:  # noqa: ANN401 - locust's, which knows env_var
    """Declare the options."""
    group = parser.add_argument_group("Image server")
    for name, text in _OPTIONS.items():
        variable = f"LOAD_{name.replace('-', '_').upper()}"
        kind = {"action": "store_true"} if name == "others" else {"default": ""}
        group.add_argument(f"--{name}", env_var=variable, help=text, **kind)


def parse(options: Namespace) -> Parameters:
    """Return what the options say.

    Raises:
        ValueError: they do not fit together; ``str()`` says how.
    """
    read = tuple(_readable(word) for word in options.read.split())
    write = tuple(options.write.split())
    ids = [image.id for image in read] + list(write)
    if len(set(ids)) != len(ids):
        raise ValueError("an id may be named only once in --read and --write")
    config_dir = Path(options.config_dir) if options.config_dir else None
    control_socket = Path(options.control_socket) if options.control_socket else None
    if config_dir and not any((config_dir / image.id).is_file() for image in read):
        raise ValueError("--config-dir has no transfer file of --read")
    if control_socket and not config_dir:
        raise ValueError("--control-socket needs --config-dir, for the transfers to register")
    return Parameters(read, write, config_dir, control_socket, options.others)


def _readable(word: str) -> Readable:
    transfer_id, *files = word.split("=")
    if len(files) > 2 or not all((transfer_id, *files)):  # noqa: PLR2004 - content and base
        raise ValueError(f"--read: {word} is not ID, ID=FILE or ID=FILE=BASE")
    return Readable(transfer_id, *map(Path, files))
