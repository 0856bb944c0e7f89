# SPDX-License-Identifier: Apache-2.0
"""Answers in JSON (docs/api.md), to the last header field."""

from tests.system.harness import Answer

#: The fields that every answer in JSON has, but for the length.
COMMON = {
    "accept-ranges": "bytes",
    "access-control-allow-methods": "GET, PUT, OPTIONS",
    "cache-control": "no-store",
    "content-type": "application/json",
}
UNKNOWN = (404, "unknown image_id")


def assert_only_common_fields(answer: Answer, **fields: str) -> None:
    assert answer.fields == COMMON | {"content-length": str(len(answer.body))} | fields


def assert_ok(answer: Answer, **more: int) -> None:
    assert (answer.status, answer.json) == (200, {"ok": True, **more})
    assert_only_common_fields(answer)


def assert_refused(answer: Answer, status: int, message: str, **fields: str) -> None:
    assert (answer.status, answer.json) == (status, {"error": message})
    assert_only_common_fields(answer, **fields)
