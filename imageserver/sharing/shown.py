# SPDX-License-Identifier: Apache-2.0
"""What ``share`` prints of each FILE: its URL, and lines that work as they stand."""

import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count

from imageserver.client.showing.units import plain_text, size_text
from imageserver.sharing.sources import Source, Wanted


@dataclass(frozen=True, slots=True)
class Shared:
    """A FILE under its URL; ``cacert``: what clients trust, with TLS."""

    source: Source
    id: str
    url: str
    copy: str
    """The name of a copy's file, without its extension."""
    cacert: str | None = None

    @property
    def curl(self) -> str:
        """A line that downloads the disk with curl, as a qcow2 file without holes."""
        trust = ["--cacert", self.cacert] if self.cacert else []
        url = f"{self.url}?format=qcow2"
        return shlex.join(["curl", "-f", *trust, "-o", f"{self.copy}.qcow2", url])

    @property
    def imagectl(self) -> str:
        """A line that downloads the disk with imagectl, into a sparse file."""
        trust = ["--cacert", self.cacert] if self.cacert else []
        return shlex.join([_imagectl(), "download", *trust, self.url, f"{self.copy}.raw"])

    def text(self, wanted: Wanted) -> str:
        """Return the lines for people."""
        source = self.source
        facts = [source.kind, size_text(source.size), *(["read-only"] * wanted.read_only)]
        facts += [f"bitmap {plain_text(wanted.bitmap)}"] if wanted.bitmap is not None else []
        return (
            f"{plain_text(source.name)} ({', '.join(facts)})\n"
            f"  {self.url}\n  {self.curl}\n  {self.imagectl}\n"
        )

    def line(self, wanted: Wanted) -> str:
        """Return the line for programs."""
        fields = {
            "file": self.source.name,
            "format": self.source.kind,
            "size": self.source.size,
            "read_only": wanted.read_only,
            "bitmap": wanted.bitmap,
            "id": self.id,
            "url": self.url,
            "curl": self.curl,
            "imagectl": self.imagectl,
        }
        return json.dumps(fields) + "\n"


def copy_names(files: Sequence[str]) -> Iterator[str]:
    """Yield a name for a copy of each file: no file's own, lest a copy overwrite its source."""
    names = [os.path.basename(file.rstrip("/").partition("?")[0]) or "disk" for file in files]
    taken = {os.path.splitext(name)[0] for name in names}
    for name in names:
        stem = plain_text(os.path.splitext(name)[0])
        numbered = (f"{stem}-{number}.copy" for number in count(2))
        copy = next(each for each in chain([f"{stem}.copy"], numbered) if each not in taken)
        taken.add(copy)
        yield f"{'./' * stem.startswith('-')}{copy}"


def _imagectl() -> str:
    """Return imagectl as a shell finds it; where it is not on the path, the one beside us."""
    beside = os.path.join(os.path.dirname(sys.executable), "imagectl")
    if shutil.which("imagectl") is None and os.access(beside, os.X_OK):
        return beside
    return "imagectl"
