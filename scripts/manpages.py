# SPDX-License-Identifier: Apache-2.0
"""Manual pages of ``imagectl`` and ``imageserver``, from the help of their commands.

    click command     --of_click------>  Command  --page-->  docs/man/NAME.1
    argparse parser   --of_argparse-->

What the terminal's width or the version of Python decides (columns, headings) is not in them.
"""

import argparse
import inspect
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click

import imageserver
from imageserver.__main__ import share_command
from imageserver.client.commands.cli import imagectl
from imageserver.server import commandline as server

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs" / "man"
#: What click does not wrap.
_VERBATIM = "\b"
#: ... and what is laid out by hand, such as examples.
_INDENTED = "\n  "


@dataclass(frozen=True, slots=True)
class Command:
    """A command and those beneath it. Text has paragraphs; ``_VERBATIM`` begins one as it is."""

    words: str
    arguments: str
    text: str
    options: list[tuple[str, str]]
    commands: "list[Command]"
    epilog: str = ""

    def walk(self) -> "Iterator[Command]":
        """Yield this command, then all beneath it."""
        yield self
        for command in self.commands:
            yield from command.walk()


def of_click(command: click.Command, parent: click.Context | None, name: str) -> Command:
    """Return what click knows of a command."""
    ctx = click.Context(command, parent=parent, info_name=name, **command.context_settings)
    records = (parameter.get_help_record(ctx) for parameter in command.get_params(ctx))
    beneath: dict[str, click.Command | None] = {}
    if isinstance(command, click.Group):
        beneath = {child: command.get_command(ctx, child) for child in command.list_commands(ctx)}
    children = [of_click(child, ctx, word) for word, child in beneath.items() if child]
    return Command(
        ctx.command_path,
        " ".join(command.collect_usage_pieces(ctx)),
        inspect.cleandoc(command.help or ""),
        [record for record in records if record and record[1]],
        children,
        inspect.cleandoc(command.epilog or ""),
    )


def of_argparse(parser: argparse.ArgumentParser, text: str = "") -> Command:
    """Return what argparse knows of a command; ``text`` describes it where nothing else does."""
    children: list[Command] = []
    options: list[tuple[str, str]] = []
    positionals: list[str] = []
    for action in parser._actions:  # noqa: SLF001 - argparse shows them in its help only
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001 - as above
            said = {choice.dest: choice.help for choice in action._choices_actions}  # noqa: SLF001
            children += [of_argparse(sub, said[name] or "") for name, sub in action.choices.items()]
            positionals.append(str(action.metavar or "COMMAND"))
        elif action.help != argparse.SUPPRESS:
            options.append((_terms(action), _expanded(parser, action)))
            several = "..." if action.nargs == "+" else ""
            positionals += [] if action.option_strings else [f"{_metavar(action)}{several}"]
    groups = [
        f"{str(group.title).capitalize()}: {group.description}"
        for group in parser._action_groups  # noqa: SLF001 - as above
        if group.description
    ]
    return Command(
        parser.prog,
        " ".join(["[OPTIONS]", *positionals]),
        "\n\n".join([parser.description or _sentence(text), *groups]),
        options,
        children,
        parser.epilog or "",
    )


def _metavar(action: argparse.Action) -> object:
    if action.choices is not None and action.metavar is None:
        return "{" + ",".join(map(str, action.choices)) + "}"
    return action.metavar or action.dest.upper()


def _terms(action: argparse.Action) -> str:
    if not action.option_strings:
        return str(_metavar(action))
    return ", ".join(action.option_strings) + ("" if action.nargs == 0 else f" {_metavar(action)}")


def _expanded(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """Return an option's help, a whole sentence as click's are."""
    values = vars(action) | {"prog": parser.prog}
    return _sentence((action.help or "") % values)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}" + ("" if text.endswith((".", "!")) else ".")


def page(root: Command, title: str, also: str) -> str:
    """Write a manual page in man(7)'s macros."""
    name = root.words
    lines = [
        '.\\" SPDX-License-Identifier: Apache-2.0',
        '.\\" Made by scripts/man from the help of the command.',
        f'.TH {name.upper()} 1 "{released()}" "imageserver {imageserver.__version__}"',
        ".SH NAME",
        f"{name} \\- {roff(title)}",
        ".SH SYNOPSIS",
    ]
    for command in root.walk():
        if not command.commands:
            lines += [f".B {roff(command.words)}", roff(command.arguments), ".br"]
    lines += [".SH DESCRIPTION", *_paragraphs(root.text), ".SH OPTIONS", *_list(root.options)]
    if root.commands:
        lines += _commands(root)
    lines += [*_epilog(root.epilog), ".SH SEE ALSO", also]
    return "\n".join(lines) + "\n"


def _commands(root: Command) -> Iterator[str]:
    """Write each command with the options of its own; those of most commands stand once."""
    beneath = list(root.walk())[1:]
    uses = Counter(option for command in beneath for option in command.options)
    common = [option for option, count in uses.items() if count > len(beneath) / 2]
    yield ".SH COMMANDS"
    for command in beneath:
        title = f"{command.words.removeprefix(f'{root.words} ')} {command.arguments}"
        own = [option for option in command.options if option not in common]
        shared = [_name(option) for option in command.options if option in common]
        yield f'.SS "{roff(title)}"'
        yield from (*_paragraphs(command.text), *_list(own), *_paragraphs(command.epilog))
        if shared:
            yield from (".PP", f"Common options: {roff(', '.join(shared))}.")
    if common:
        yield from (".SH COMMON OPTIONS", *_list(common))


def _name(option: tuple[str, str]) -> str:
    """Return an option's long name."""
    return option[0].split(", ")[-1].split()[0]


def _paragraphs(text: str) -> Iterator[str]:
    for paragraph in filter(None, text.split("\n\n")):
        if paragraph.startswith(_VERBATIM):
            yield from (".PP", ".nf", *map(roff, paragraph.split("\n")[1:]), ".fi")
        elif _INDENTED in paragraph:
            yield from (".PP", ".nf", *map(roff, paragraph.split("\n")), ".fi")
        else:
            yield from (".PP", roff(" ".join(paragraph.split())))


def _epilog(text: str) -> Iterator[str]:
    """Turn "Heading:" and its lines into a section of their own."""
    heading, _, rest = text.removeprefix(_VERBATIM).strip("\n").partition(":\n")
    if rest and "\n" not in heading:
        yield from (f".SH {roff(heading.upper())}", ".nf", *map(roff, rest.rstrip().split("\n")))
        yield ".fi"
    else:
        yield from _paragraphs(text)


def _list(options: list[tuple[str, str]]) -> Iterator[str]:
    for terms, text in options:
        yield from (".TP", f".B {roff(terms)}", roff(" ".join(text.split())))


def roff(text: str) -> str:
    """Escape what roff takes for its own: backslashes, hyphens, a line's first character."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return re.sub(r"^(?=[.'])", r"\\&", text)


def released() -> str:
    """Return the day of this version's release, of the changelog; empty before it has one."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    version = re.escape(imageserver.__version__)
    found = re.search(rf"^## \[{version}\] - (\S+)$", text, re.MULTILINE)
    return found[1] if found else ""


def pages() -> dict[str, str]:
    """Return each page's text by the name of its file."""
    return {
        "imagectl.1": page(
            of_click(imagectl, None, "imagectl"),
            "move, show and watch disk images on an image server",
            ".BR imageserver (1)",
        ),
        "imageserver.1": page(
            of_argparse(server.parser(share_command())),
            "serve virtual disks over HTTP",
            ".BR imagectl (1)",
        ),
    }


def main() -> None:
    """Write the pages anew."""
    PAGES.mkdir(exist_ok=True)
    for name, text in pages().items():
        (PAGES / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
