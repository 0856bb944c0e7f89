# SPDX-License-Identifier: Apache-2.0
"""One client with one connection. Every answer is judged here, and locust told.

    a good status, and the check passes     a success
    409 or 503 that may be due              nothing yet: the ledger decides, when it can
    everything else                         a failure: other statuses, wrong bytes, a cut

In locust's statistics a request's type is the user, its name what it did. A refusal that the
limits explain stands in a line of its own, so that it does not make the others look fast; one
that they do not explain is a failure of the line it would have been in.
"""

import json
import ssl
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

from lab.model import WrongBytes
from lab.wire import Answer as WireAnswer
from lab.wire import Cut, Hanging, Wire

from loading.ledger import Entry, Kind, Ledger, Outcome, Verdict
from loading.ledger import Image as Lockable

#: Longer than any of the server's own bounds: what takes longer hangs.
_PATIENCE_SECONDS = 90.0
REFUSED = ": refused"
_NOT_FOUND, _UNAVAILABLE = 404, 503
#: Refusals that limits may explain, by status and message (docs/api.md, "Errors").
_REFUSALS = {
    (409, "image busy"): Outcome.NO_LOCK,
    (503, "too many parallel reads"): Outcome.NO_SLOT,
    (503, "too many parallel writes"): Outcome.NO_SLOT,
}


class Unexpected(Exception):
    """What locust shows as a failure."""


@dataclass(frozen=True, slots=True)
class Call:
    """A request, and what is expected of it."""

    name: str
    method: str
    path: str
    good: Collection[int] = (200,)
    kind: Kind | None = None
    """What it takes of the server; None: nothing, so it is never refused."""
    image: Lockable | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Answer(WireAnswer):
    """An answer that has come whole."""

    refused: bool = False

    @property
    def json(self) -> Any:  # noqa: ANN401 - JSON
        """The body, parsed."""
        try:
            return json.loads(self.body)
        except ValueError as exc:
            raise Unexpected(f"{self.status} without JSON: {self.body[:80]!r}") from exc

    @property
    def error(self) -> str:
        """The message of an error."""
        found = self.json
        return str(found.get("error")) if isinstance(found, dict) else ""


class Reporter:
    """Records requests in the ledger, and tells locust the verdicts."""

    def __init__(self, ledger: Ledger, fire: Callable[..., None], *, others: bool) -> None:
        """``fire``: locust's request event; ``others``: the server has other clients."""
        self.ledger = ledger
        self.fire = fire
        self._others = others
        self._waiting: dict[Entry, dict[str, Any]] = {}

    def end(self, entry: Entry, outcome: Outcome, fields: dict[str, Any] | None = None) -> None:
        """Note the end of a request; ``fields`` of a refusal are told when it is judged."""
        if fields is not None:
            self._waiting[entry] = fields
        self._tell(self.ledger.end(entry, outcome, time.monotonic()))

    def close(self) -> None:
        """Judge all that is left."""
        self._tell(self.ledger.close())

    def _tell(self, verdicts: list[Verdict]) -> None:
        for verdict in verdicts:
            fields = self._waiting.pop(verdict.entry)
            if verdict.is_explained or self._others:
                fields["name"] += REFUSED
                fields["exception"] = None
            self.fire(**fields)


def told(
    user: str, name: str, began: float, moved: int, problem: Exception | None
) -> dict[str, Any]:
    """Return what locust's request event is told."""
    return {
        "request_type": user,
        "name": name,
        "response_time": (time.perf_counter() - began) * 1000,
        "response_length": moved,
        "exception": problem,
    }


class Client:
    """A connection to the server, kept as long as the server keeps it."""

    def __init__(self, host: str, user: str, reporter: Reporter) -> None:
        """``user``: whose requests these are, in the statistics."""
        parts = urlsplit(host)
        context = ssl.create_default_context() if parts.scheme == "https" else None
        name, port = parts.hostname or "", parts.port or (443 if context else 80)
        self._connect: Callable[[], Wire] = lambda: Wire(
            port, _PATIENCE_SECONDS, context, host=name
        )
        self._wire: Wire | None = None
        self._user = user
        self._reporter = reporter

    def close(self) -> None:
        """Close the connection."""
        if self._wire:
            self._wire.__exit__()
        self._wire = None

    def ask(
        self,
        call: Call,
        check: Callable[[Answer], None] = lambda _: None,
        on_head: Callable[[], None] = lambda: None,
    ) -> Answer | None:
        """Make a request. ``check`` raises for an answer that is good by its status only.

        Returns None after a failure; an answer that is ``refused`` for a refusal, due or not.
        """
        entry = None
        if call.kind and call.image:
            entry = self._reporter.ledger.begin(call.kind, call.image, time.monotonic())
        began = time.perf_counter()
        try:
            answer = self._exchange(call, on_head)
        except BaseException as exc:
            self.close()
            self._end(entry, Outcome.LOST)
            if not isinstance(exc, (Cut, Hanging)):
                raise  # the user is being ended
            self._reporter.fire(**told(self._user, call.name, began, 0, exc))
            return None
        return self._judge(call, entry, began, answer, check)

    def _exchange(self, call: Call, on_head: Callable[[], None]) -> Answer:
        self._wire = wire = self._wire or self._connect()
        headers = {"User-Agent": "imageserver-load", **call.headers}
        wire.ask(call.method, call.path, headers, call.body)
        head = wire.head()
        on_head()
        answer = Answer(head.status, head.fields, wire.body(head, call.method))
        if answer.fields.get("connection") == "close":
            self.close()
        return answer

    def _judge(
        self,
        call: Call,
        entry: Entry | None,
        began: float,
        answer: Answer,
        check: Callable[[Answer], None],
    ) -> Answer | None:
        moved = len(answer.body) + len(call.body)
        outcome = Outcome.DONE
        problem: Exception | None = None
        try:
            outcome = _outcome(call, answer)
            if answer.status not in call.good:
                problem = Unexpected(f"{answer.status} {answer.error}")
            else:
                check(answer)
        except (WrongBytes, Unexpected) as exc:
            problem = exc
        if entry and outcome in _REFUSALS.values():
            # Of what it has sent nothing was taken: only the answer has moved.
            problem = Unexpected(f"{problem}: no limit explains it")
            fields = told(self._user, call.name, began, len(answer.body), problem)
            self._reporter.end(entry, outcome, fields)
            return replace(answer, refused=True)
        self._end(entry, outcome)
        self._reporter.fire(**told(self._user, call.name, began, moved, problem))
        return None if problem else answer

    def _end(self, entry: Entry | None, outcome: Outcome) -> None:
        if entry:
            self._reporter.end(entry, outcome)


def _outcome(call: Call, answer: Answer) -> Outcome:
    """Return what an answer says about lock and slot."""
    if answer.status == _NOT_FOUND:
        return Outcome.NOTHING
    statuses = {status for status, _ in _REFUSALS}
    if answer.status not in statuses or "retry-after" not in answer.fields:
        return Outcome.DONE
    expected = "reads" if call.kind is Kind.READ else "writes"
    if answer.status == _UNAVAILABLE and answer.error != f"too many parallel {expected}":
        return Outcome.DONE
    return _REFUSALS.get((answer.status, answer.error), Outcome.DONE)
