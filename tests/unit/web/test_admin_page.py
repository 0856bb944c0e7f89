# SPDX-License-Identifier: Apache-2.0
"""The operators' page: one small file, which runs and asks nothing that is not in it."""

import base64
import hashlib
import re

from falcon import App, testing

from imageserver.web.admin_page import Page

MOST_BYTES = 60 << 10


def answer() -> testing.Result:
    app = App()
    app.add_route("/", Page())
    return testing.TestClient(app).simulate_get("/")


def test_the_page_is_small():
    assert len(answer().content) < MOST_BYTES


def test_nothing_is_loaded_and_no_element_has_code_or_style_of_its_own():
    text = answer().text
    without_svg_name = text.replace("http://www.w3.org/2000/svg", "")
    assert re.findall(r"(?:https?:)?//[a-z]", without_svg_name) == []
    assert re.findall(r"<(?:script|link|img|iframe)[^>]* (?:src|href)=\"(?!data:,\")", text) == []
    assert re.findall(r"<[^>]* (?:on[a-z]+|style)=", text) == []
    assert (
        re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|\.style", text) == []
    )


def test_a_browser_may_run_what_stands_in_it_and_nothing_else():
    got = answer()
    rules = dict(rule.split(" ", 1) for rule in got.headers["Content-Security-Policy"].split("; "))
    for kind in ("script", "style"):
        (content,) = re.findall(f"<{kind}>(.*?)</{kind}>", got.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules.pop(f"{kind}-src") == f"'sha256-{digest}'"
    assert rules == {
        "default-src": "'none'",
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
