# SPDX-License-Identifier: Apache-2.0
"""The operators' page, as a browser shows it."""

import hashlib
import shutil
import sys
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

_WIDTH, _HEIGHT = 1000, 560


def photograph(address: str, shown_as: str, transfer: str, seconds: float, into: Path) -> None:
    """Take pictures of the page at HOST:PORT, and of one transfer opened in it.

    ``shown_as``: the address that they show. ``seconds``: for how long the page is looked at, so
    that its lines show something. None are taken where there is no Chromium.
    """
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        sys.stderr.write("no pictures of the page: chromium is missing\n")
        return
    name = hashlib.sha256(transfer.encode()).hexdigest()[:12]
    size = {"width": _WIDTH, "height": _HEIGHT}
    with sync_playwright() as playwright:
        # The sandbox needs user namespaces, which containers lack; only our own page is loaded.
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_context(viewport=size).new_page()  # type: ignore[arg-type]
        page.goto(f"http://{address}/")
        page.wait_for_timeout(seconds * 1000)
        page.evaluate("text => {document.getElementById('host').textContent = text}", shown_as)
        page.screenshot(path=into / "page.png")
        page.evaluate("id => open(id)", name)
        expect(page.locator("#o-map")).to_contain_text("As it was at")
        page.locator("#map rect.read").first.wait_for()
        page.locator("#h-opened").blur()
        page.locator("#opened").screenshot(path=into / "page-transfer.png")
        browser.close()
