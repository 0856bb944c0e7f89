# SPDX-License-Identifier: Apache-2.0
"""The operators' page in a real browser, against a real server under load."""

import contextlib
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.system.clients import putting, reading
from tests.system.disks import BIG
from tests.system.harness import Server, wait_until
from tests.system.looking import mixed
from tests.system.skips import chromium, needs
from tests.system.watching import Admin, short, watched

pytestmark = needs("chromium")

MARKUP = "<img src=x onerror=document.title='xss'>"


@pytest.fixture(scope="module")
def server(workplace: Path, tcp: Admin, big: dict[str, str]) -> Iterator[Server]:
    with watched(workplace, big, tcp) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # The sandbox needs user namespaces, which containers lack; only our own page is loaded.
        launched = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield launched
        launched.close()


class Seen:
    """The page as an operator has it open; ``problems``: what its console says of errors."""

    def __init__(self, page: Page, admin: Admin) -> None:
        self.page = page
        self.problems: list[str] = []
        page.on("console", lambda said: self._note(said.type, said.text))
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.goto(f"http://{admin.bind}/")
        expect(page.locator("#fresh")).to_contain_text("Updated")

    def _note(self, kind: str, text: str) -> None:
        if kind in {"error", "warning"}:
            self.problems.append(text)

    def row(self, transfer: str) -> Any:
        return self.page.locator("#transfers tbody tr", has_text=short(transfer))

    def percent(self, transfer: str) -> float:
        found = re.search(r"([0-9.]+) %", self.row(transfer).inner_text())
        return float(found[1]) if found else -1.0

    def violations(self) -> list[tuple[str, str]]:
        found = Axe().run(self.page).response["violations"]
        return [(each["id"], each["nodes"][0]["html"]) for each in found]


@pytest.fixture
def seen(browser: Browser, server: Server, tcp: Admin) -> Iterator[Callable[..., Seen]]:
    with contextlib.ExitStack() as opened:

        def see(**how: Any) -> Seen:
            context = browser.new_context(**how)
            opened.callback(context.close)
            return Seen(context.new_page(), tcp)

        yield see


def test_rows_appear_and_progress_moves(seen, server):
    page = seen()
    expect(page.page.locator("#none")).to_be_visible()
    with reading(server, "/images/big"), putting(server, "/images/file", BIG, bytes(1)) as (put, _):
        expect(page.row("big")).to_contain_text("read")
        expect(page.row("file")).to_contain_text("127.0.0.1")
        expect(page.page.locator("#writes")).to_have_text("1 of 2")
        moved = [page.percent("file")]
        for _ in range(2):
            put.sendall(bytes(BIG >> 3))
            moved.append(wait_until(lambda: (p := page.percent("file")) > moved[-1] and p))
        assert page.page.title() == "2 transfers: imageserver"
    expect(page.page.locator("#none")).to_be_visible()
    expect(page.page.locator("#failed tbody tr", has_text=short("file"))).to_contain_text("client")
    assert page.problems == []


def test_what_clients_and_control_programs_have_chosen_never_shows(seen, server):
    page = seen()
    fields = dict.fromkeys(("X-Request-Id", "User-Agent", "Referer", "X-Forwarded-For"), MARKUP)
    for path in ("/images/%3Cb%3E", "/images/<script>", "/%3Cb%3E"):
        assert server.request("GET", path, headers=fields).status == 404
    server.add("<i>", socket=f"/nowhere/{MARKUP}")
    assert server.request("GET", "/images/%3Ci%3E", headers=fields).status == 500
    row = page.page.locator("#failed tbody tr", has_text=short("<i>"))
    expect(row).to_contain_text("server failed")
    row.locator("button").click()
    expect(page.page.locator("#o-map")).to_contain_text("No map: the image cannot be asked now")
    shown = page.page.content()
    assert [text for text in ("<i>", "onerror", "nowhere", "%3C", "xss") if text in shown] == []
    assert "imageserver" in page.page.title()
    assert page.problems == []


def test_a_killed_workers_transfer_vanishes(seen, server):
    page = seen()
    with contextlib.suppress(OSError), reading(server, "/images/big") as sock:
        expect(page.row("big")).to_be_visible()
        os.kill(server.worker_of(sock), signal.SIGKILL)
        expect(page.page.locator("#none")).to_be_visible()
        wait_until(lambda: len(server.worker_pids()) == 3)
    expect(page.page.locator("#processes tbody tr")).to_have_count(3)
    assert page.problems == []


def test_the_server_goes_away_and_the_page_recovers_when_it_is_back(seen, server):
    page = seen()
    lost = page.page.locator("#lost")
    expect(lost).to_be_hidden()
    server.stop()
    expect(lost).to_contain_text("does not answer")
    server.start()
    expect(lost).to_be_hidden()
    expect(page.page.locator("#news")).to_have_text("The server answers again.")
    with reading(server, "/images/big"):
        expect(page.row("big")).to_be_visible()
    assert {re.sub(".*: ", "", each) for each in page.problems} == {"net::ERR_CONNECTION_REFUSED"}


def test_an_opened_transfer_has_its_map_and_what_was_touched_painted_over_it(
    seen, server, home, tcp
):
    page = seen()
    with mixed(server, home) as url:
        name = url.rpartition("/")[2]
        half = {"Range": "bytes=0-4194303"}
        assert server.request("GET", f"/images/{name}", headers=half).status == 206
        page.page.locator("#finished button", has_text=short(name)).press("Enter")
        expect(page.page.locator("#o-map")).to_contain_text("As it was at")
        said = page.page.locator("#o-said")
        expect(said).to_have_text(
            "8.0 MiB: clean data 1.0 MiB (12.5 %), clean zero 5.0 MiB (62.5 %), "
            "dirty data 1.0 MiB (12.5 %), dirty zero 1.0 MiB (12.5 %), read: about 50.0 %."
        )
        assert page.page.locator("#map rect.read").count() == 4  # rows of cells
        expect(page.page.locator("#requests tbody tr")).to_contain_text("finished (206)")
        expect(page.page.locator("#h-opened")).to_be_focused()
        page.page.keyboard.press("Escape")
        expect(page.page.locator("#opened")).to_be_hidden()
        expect(page.page.locator("#finished button", has_text=short(name))).to_be_focused()
        assert tcp.ask(f"/map?transfer={short(name)}").json["problem"] == ""
    assert page.problems == []


def test_nothing_keeps_people_out_and_a_phone_is_wide_enough(seen, server):
    server.add("lost", socket="/nowhere")
    for name, status in (("lost", 500), ("none", 404)):
        assert server.request("GET", f"/images/{name}").status == status
    page = seen(color_scheme="light", viewport={"width": 360, "height": 740})
    with reading(server, "/images/big"):
        page.row("big").locator("button").click()
        expect(page.page.locator("#requests tbody tr").first).to_contain_text("running")
        for table in ("failed", "refused"):
            expect(page.page.locator(f"#{table} tbody tr").first).to_be_visible()
        assert page.violations() == []
        assert page.page.evaluate("document.documentElement.scrollWidth") <= 360
        page.page.set_viewport_size({"width": 1280, "height": 900})
        page.page.emulate_media(color_scheme="dark")
        assert page.violations() == []
    assert page.problems == []


def test_a_page_of_another_origin_reads_nothing(browser, server, tcp):
    context = browser.new_context()
    page = context.new_page()
    page.goto(f"http://127.0.0.1:{server.port}/")
    ask = "fetch(`http://{}/status`, {{mode: '{}'}}).then(a => a.type, e => e.name)"
    assert page.evaluate(ask.format(tcp.bind, "cors")) == "TypeError"
    assert page.evaluate(ask.format(tcp.bind, "no-cors")) in {"opaque", "TypeError"}
    context.close()
