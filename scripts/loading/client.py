# SPDX-License-Identifier: Apache-2.0
"""One client with one connection. Every answer is judged here, and locust told.

    a good status, and the check passes     a success
    409 or 503 that may be due              nothing yet: the ledger decides, when it can
    everything else                         a failure: other statuses, wrong bytes, a cut

In locust's statistics a request's type is the user, its name what it did. A refusal that the
limits explain stands in a line of its own, so that it does not make the others look fast; one
that they do not explain is a failure of the line it would have been in.
"""

import http.client
import json
import ssl
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from soaking.model import WrongBytes

from loading.ledger import Entry, Kind, Ledger, Outcome, Verdict
from loading.ledger import Image as Lockable

#: Longer than any of the server's own bounds: what takes longer hangs.
_PATIENCE_SECONDS = 90.0
REFUSED = ": refused"
#: Refusals that limits may explain, by status and message (docs/api.md, "Errors").
_REFUSALS = {
    (409, "image busy"): Outcome.NO_LOCK,
    (503, "too many parallel reads"): Outcome.NO_SLOT,
    (503, "too many parallel writes"): Outcome.NO_SLOT,
}
_MAY_REFUSE = frozenset(status for status, _ in _REFUSALS)


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
    body: bytes | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer that has come whole."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes
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


class Referee:
    """The ledger of a run, and where its verdicts go."""

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


class Client:
    """A connection to the server, kept as long as the server keeps it."""

    def __init__(self, host: str, user: str, referee: Referee) -> None:
        """``user``: whose requests these are, in the statistics."""
        parts = urlsplit(host)
        secure = parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        more: dict[str, Any] = {"context": ssl.create_default_context()} if secure else {}
        self._connection = kind(parts.hostname or "", parts.port, timeout=_PATIENCE_SECONDS, **more)
        self._user = user
        self._referee = referee

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

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
            entry = self._referee.ledger.begin(call.kind, call.image, time.monotonic())
        began = time.perf_counter()
        try:
            answer = self._exchange(call, on_head)
        except (OSError, http.client.HTTPException) as exc:
            self.close()
            self._end(entry, Outcome.LOST)
            self._tell(call, began, 0, Unexpected(f"{type(exc).__name__}: {exc}"))
            return None
        except BaseException:  # the user is being ended
            self.close()
            self._end(entry, Outcome.LOST)
            raise
        return self._judge(call, entry, began, answer, check)

    def _exchange(self, call: Call, on_head: Callable[[], None]) -> Answer:
        headers = {"User-Agent": "imageserver-load", **call.headers}
        self._connection.request(call.method, call.path, call.body, headers)
        response = self._connection.getresponse()
        on_head()
        return Answer(response.status, response.headers, response.read())

    def _judge(
        self,
        call: Call,
        entry: Entry | None,
        began: float,
        answer: Answer,
        check: Callable[[Answer], None],
    ) -> Answer | None:
        moved = len(answer.body) + len(call.body or b"")
        outcome, problem = Outcome.DONE, None
        try:
            outcome = _outcome(call, answer)
            problem = _problem(call, answer)
            if problem is None:
                check(answer)
        except (WrongBytes, Unexpected) as exc:
            problem = exc
        if entry and outcome in _REFUSALS.values():
            # Of what it has sent nothing was taken: only the answer has moved.
            problem = Unexpected(f"{problem}: no limit explains it")
            fields = self._fields(call, began, len(answer.body), problem)
            self._referee.end(entry, outcome, fields)
            return Answer(answer.status, answer.headers, answer.body, refused=True)
        self._end(entry, outcome)
        self._tell(call, began, moved, problem)
        return None if problem else answer

    def _end(self, entry: Entry | None, outcome: Outcome) -> None:
        if entry:
            self._referee.end(entry, outcome)

    def _tell(self, call: Call, began: float, moved: int, problem: Exception | None) -> None:
        self._referee.fire(**self._fields(call, began, moved, problem))

    def _fields(
        self, call: Call, began: float, moved: int, problem: Exception | None
    ) -> dict[str, Any]:
        return {
            "request_type": self._user,
            "name": call.name,
            "response_time": (time.perf_counter() - began) * 1000,
            "response_length": moved,
            "exception": problem,
        }


def _problem(call: Call, answer: Answer) -> Exception | None:
    good = answer.status in call.good
    return None if good else Unexpected(f"{answer.status} {answer.error}")


def _outcome(call: Call, answer: Answer) -> Outcome:
    """Return what an answer says about lock and slot."""
    if answer.status == 404:  # noqa: PLR2004
        return Outcome.NOTHING
    if answer.status not in _MAY_REFUSE or answer.headers["Retry-After"] is None:
        return Outcome.DONE
    expected = "reads" if call.kind is Kind.READ else "writes"
    if answer.status == 503 and answer.error != f"too many parallel {expected}":  # noqa: PLR2004
        return Outcome.DONE
    return _REFUSALS.get((answer.status, answer.error), Outcome.DONE)
