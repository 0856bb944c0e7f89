# SPDX-License-Identifier: Apache-2.0
"""The command line of ``imageserver``: serve, share files, say whether it could, print settings.

Every setting is a flag of ``serve``, ``check`` and ``config show``, and wins over its variable in
the environment. An upgrade (SIGUSR2) executes the same command line, so flags survive it.
"""

import argparse
import io
import os
import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, NoReturn, TextIO

from imageserver import __version__
from imageserver.server import cloudstack
from imageserver.server.configuration import ImageApplication
from imageserver.server.preconditions import CannotStart, check
from imageserver.server.startup import in_force, read_settings
from imageserver.settings import Settings, as_text, flag_of, variable_of

_SAMPLE_HEAD = """\
# SPDX-License-Identifier: Apache-2.0
# The server's settings, printed by `imageserver config sample`.
#
# Every setting with its default; uncomment a line to change it. One VARIABLE=value a line, as
# systemd reads it (EnvironmentFile= of imageserver.service). A wrong value stops the server at
# start with a sentence that names the variable. Settings are read once: after a change, restart.
# imageserver.service sets IMAGESERVER_CONFIG_DIR and IMAGESERVER_RUNTIME_DIR; a line here wins.
"""


@dataclass(frozen=True, slots=True)
class Share:
    """The command ``share``, of a layer above: what its command line may have, and what runs it."""

    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def main(share: Share, arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    command_line = parser(share)
    parsed = command_line.parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path need not fit the locale
        sys.stdout.reconfigure(errors="surrogateescape")
    if parsed.question and parsed.run:
        command_line.error("a command excludes --check, --show-config and --sample-config")
    try:
        parsed.agent_flags = cloudstack.flags_in(parsed)
    except ValueError as exc:
        command_line.error(str(exc))
    run: Callable[[argparse.Namespace], int] | None = parsed.run or parsed.question
    if parsed.agent_flags is not None:
        if run not in {None, _show}:
            command_line.error("--listen and the flags beside it allow --show-config only")
        run = run or _serve_agent
    if run is None:
        command_line.print_help()
        return 0
    return run(parsed)


class _Parser(argparse.ArgumentParser):
    """Refuses a command line in one sentence, as wrong settings are refused."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"imageserver: {message}; see {self.prog} --help.\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        _write(message, file or sys.stderr)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse what this command does not know: the root would name its own help."""
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return parsed, unknown


def parser(share: Share) -> argparse.ArgumentParser:
    """Return the command line's grammar."""
    root = _Parser(
        prog="imageserver",
        description="Serve virtual disks, NBD exports and image files, over HTTP.",
        allow_abbrev=False,
    )
    root.set_defaults(run=None, question=None)
    root.add_argument("--version", action="version", version=__version__)
    older = root.add_mutually_exclusive_group()
    for flag, run, command in (
        ("--check", _check, "check"),
        ("--show-config", _show, "config show"),
        ("--sample-config", _sample, "config sample"),
    ):
        older.add_argument(
            flag, dest="question", action="store_const", const=run, help=f"the same as {command}"
        )
    cloudstack.add_flags(root)
    commands = root.add_subparsers(title="commands", metavar="COMMAND", parser_class=_Parser)
    _add(commands, "serve", _serve, "serve, in the foreground, until SIGTERM")
    sharing = commands.add_parser(
        "share", help="share image files until Ctrl-C", allow_abbrev=False
    )
    sharing.set_defaults(run=share.run)
    share.add_arguments(sharing)
    _add(commands, "check", _check, "check whether the server can start with these settings")
    config = commands.add_parser("config", help="print settings", allow_abbrev=False)
    questions = config.add_subparsers(metavar="COMMAND", parser_class=_Parser, required=True)
    _add(questions, "show", _show, "print the settings in force, as variables")
    _add(questions, "sample", _sample, "print every setting with its default", flags=False)
    return root


def _add(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int],
    explained: str,
    *,
    flags: bool = True,
) -> None:
    described = explained[0].upper() + explained[1:] + "."
    command = commands.add_parser(name, help=explained, description=described, allow_abbrev=False)
    command.set_defaults(run=run)
    if flags:
        group = command.add_argument_group(
            "settings", "Each also has a variable; --bind is IMAGESERVER_BIND. The flag wins."
        )
        for field in fields(Settings):
            group.add_argument(
                flag_of(field.name),
                metavar="VALUE",
                default=argparse.SUPPRESS,
                help=_with_default(field).replace("%", "%%"),
            )


def _settings(parsed: argparse.Namespace) -> Settings:
    if parsed.agent_flags is not None:
        return cloudstack.settings_of(parsed.agent_flags)
    given = vars(parsed)
    return read_settings(
        {field.name: given[field.name] for field in fields(Settings) if field.name in given}
    )


def serve(settings: Settings) -> None:
    """Serve; never returns."""
    ImageApplication(settings).run()


def _serve(parsed: argparse.Namespace) -> int:
    serve(_settings(parsed))
    return 0


def _serve_agent(parsed: argparse.Namespace) -> int:
    settings = _settings(parsed)
    cloudstack.prepare(settings)
    ImageApplication(settings).run()
    return 0


def _check(parsed: argparse.Namespace) -> int:
    try:
        warnings = check(_settings(parsed))
    except CannotStart as exc:
        print(f"imageserver: {exc}", file=sys.stderr)
        return 1
    _tell([*(f"warning: {warning}" for warning in warnings), "ok"])
    return 0


def _show(parsed: argparse.Namespace) -> int:
    _tell(f"{variable}={text}" for variable, text in in_force(_settings(parsed)).items())
    return 0


def _sample(_parsed: argparse.Namespace) -> int:
    """Print an environment file that names every setting and changes none."""
    lines = _SAMPLE_HEAD.splitlines()
    for field in fields(Settings):
        explained = _explained(field)
        lines += ["", f"# {explained[0].upper()}{explained[1:]}"]
        lines.append(f"#{variable_of(field.name)}={_default(field)}")
    _tell(lines)
    return 0


def _tell(lines: Iterable[str]) -> None:
    _write("".join(f"{line}\n" for line in lines), sys.stdout)


def _write(text: str, file: TextIO) -> None:
    """Write an answer; where that cannot be done, end the process, as SIGPIPE would.

    A message on stderr may be lost.
    """
    try:
        file.write(text)
        file.flush()
    except OSError as exc:
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())  # at exit it would fail again
        if isinstance(exc, BrokenPipeError):
            sys.exit(128 + signal.SIGPIPE)
        if file is sys.stdout:
            sys.exit(f"imageserver: the output cannot be written: {exc.strerror}")


def _explained(field: Field[Any]) -> str:
    shown = field.metadata["shown"]
    return f"{field.metadata['help']}" + (f" (default: {shown})" if shown else "")


def _with_default(field: Field[Any]) -> str:
    default = _default(field)
    return _explained(field) + (f" (default: {default})" if default else "")


def _default(field: Field[Any]) -> str:
    """Write the default as its variable takes it; nothing where it depends on the machine."""
    is_plain = field.default is not MISSING and not field.metadata["shown"]
    return as_text(field.default) if is_plain else ""
