# SPDX-License-Identifier: Apache-2.0
"""Runs every scene, then writes the document and the drawings."""

import argparse
import sys
from pathlib import Path

from capturing.document import filled
from capturing.scenes import world
from capturing.terminal import svg

_DOCS = Path(__file__).resolve().parents[2] / "docs"


def main() -> int:
    """Capture everything."""
    parser = argparse.ArgumentParser(
        "scripts/capture", description="Capture terminals and the page."
    )
    parser.add_argument("--into", type=Path, default=_DOCS, metavar="DIR", help="instead of docs")
    parser.add_argument("--quick", action="store_true", help="small images: does it work?")
    arguments = parser.parse_args()
    document, images = arguments.into / "imagectl.md", arguments.into / "images"
    texts = {}
    images.mkdir(exist_ok=True)
    with world(images, quick=arguments.quick) as place:
        for name, shot in place.captures():
            sys.stderr.write(f"{name}\n")
            texts[name] = f"```text\n{shot.text}```\n"
            if shot.title:
                ((_, shown),) = shot.shown
                drawing = svg(shown, shot.title)
                (images / f"imagectl-{name}.svg").write_text(drawing, encoding="utf-8")
    text = filled(document.read_text(encoding="utf-8"), texts)
    document.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
