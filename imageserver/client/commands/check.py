# SPDX-License-Identifier: Apache-2.0
"""``imagectl check``: whether a server does what it announces."""

import json
from collections.abc import Iterable

import click
from rich.console import Console
from rich.text import Text

from imageserver.client.checking.findings import Finding, Subject, Verdict, findings
from imageserver.client.checking.read_checks import CHECKS
from imageserver.client.checking.write_checks import WRITE_CHECKS
from imageserver.client.commands.options import Options, common_options
from imageserver.client.failures import Different
from imageserver.client.showing.terminal import speaks_utf8
from imageserver.client.showing.units import plain_text

#: Sign, its ASCII form, and style.
_SIGNS = {
    Verdict.OK: ("✓", "+", "green"),
    Verdict.DIFFERS: ("≠", "~", "yellow"),
    Verdict.MISSING: ("-", "-", "bright_black"),
    Verdict.FAILED: ("✗", "!", "bold red"),
}


@click.command("check")
@click.argument("url")
@click.option(
    "--write",
    is_flag=True,
    help="Also write: bytes just read, zeros where zeros are. Nobody else should write meanwhile.",
)
@common_options()
def check_command(*, url: str, write: bool, options: Options) -> None:
    """Try every announced feature, and report what works."""
    subject = Subject(options.access(url), options.patience_seconds)
    found = findings(subject, CHECKS + (WRITE_CHECKS if write else ()))
    shown = list(found if options.json or options.quiet else _printed(found))
    if options.json:
        checks = [
            {"check": one.check, "verdict": one.verdict.value, "detail": one.detail}
            for one in shown
        ]
        click.echo(json.dumps({"ok": not _failed(shown), "checks": checks}))
    if failed := _failed(shown):
        raise Different(f"{len(failed)} of {len(shown)} checks failed: {', '.join(failed)}")


def _failed(found: Iterable[Finding]) -> list[str]:
    return [one.check for one in found if one.verdict is Verdict.FAILED]


def _printed(found: Iterable[Finding]) -> Iterable[Finding]:
    """Print findings as they come, and their numbers at the end."""
    console = Console(highlight=False, soft_wrap=True)
    utf8 = speaks_utf8()
    counts = dict.fromkeys(Verdict, 0)
    for one in found:
        sign, plain, style = _SIGNS[one.verdict]
        line = Text.assemble((sign if utf8 else plain, style), f" {one.check:24} ")
        console.print(line.append(f"{one.verdict.value:8}", style).append(plain_text(one.detail)))
        counts[one.verdict] += 1
        yield one
    console.print(", ".join(f"{count} {verdict.value}" for verdict, count in counts.items()))
