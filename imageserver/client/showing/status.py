# SPDX-License-Identifier: Apache-2.0
"""The answer of ``/status`` (docs/api.md) as values, and rates between two of them; no I/O.

    poll 1    done  100 MiB    age 10.0 s
    poll 2    done  150 MiB    age 10.5 s    rate = 50 MiB / 0.5 s, however long the polls took

A poll does not name requests, so one of the last poll is recognised by worker, image, operation,
client and length, and by its beginning: the clock minus its age, right to about a network delay.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from imageserver.client.failures import Failed
from imageserver.client.showing.units import plain_text

#: How far apart two polls may see the beginning of one transfer, in seconds.
_SAME_BEGINNING = 0.5


@dataclass(frozen=True, slots=True)
class Running:
    """One transfer that runs."""

    id: str
    operation: str
    client: str
    worker: int
    done: int
    expected: int
    rate: float
    """Bytes per second: the mean, or since the last poll."""
    age: float

    @property
    def share(self) -> float | None:
        """How much is done, 0 to 1; None: it is not known of how much."""
        return min(1.0, self.done / self.expected) if self.expected else None

    @property
    def seconds_left(self) -> float | None:
        """How long it takes at this rate; None: nobody knows."""
        if not self.expected or self.rate <= 0:
            return None
        return max(0, self.expected - self.done) / self.rate


@dataclass(frozen=True, slots=True)
class Worker:
    """One process of the server, by its process id."""

    worker: int
    state: str
    busy: int


@dataclass(frozen=True, slots=True)
class Slots:
    """How many slots of a kind are taken, and how many there are; None: no such limit."""

    in_use: int
    limit: int
    limit_per_image: int | None


@dataclass(frozen=True, slots=True)
class Ended:
    """Operations that have ended alike, ``ago`` seconds before; ``error``: empty for a success."""

    id: str
    operation: str
    client: str
    status: int
    count: int
    done: int
    seconds: float
    ago: float
    error: str


@dataclass(frozen=True, slots=True)
class Lately:
    """What a server has to run transfers, and how it went; an older one tells none of it."""

    slots: Mapping[str, Slots] = field(default_factory=dict)
    finished: tuple[Ended, ...] = ()
    failed: tuple[Ended, ...] = ()
    refusals: Mapping[str, int] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    """Why it is not ready."""


@dataclass(frozen=True, slots=True)
class Status:
    """What a server does at one moment, ``taken`` on our clock."""

    transfers: tuple[Running, ...]
    workers: tuple[Worker, ...]
    taken: float
    lately: Lately = field(default_factory=Lately)

    @property
    def rate(self) -> float:
        """Bytes per second of all transfers."""
        return sum(transfer.rate for transfer in self.transfers)


def parse_status(answer: object, taken: float) -> Status:
    """Read ``/status``.

    Raises:
        Failed: it is none.
    """
    try:
        transfers = tuple(_running(fields) for fields in answer["transfers"])  # type: ignore[index]
        workers = tuple(_worker(fields) for fields in answer["workers"])  # type: ignore[index]
        lately = _lately(answer)  # type: ignore[arg-type]
    except (AttributeError, KeyError, TypeError, ValueError) as exc:
        raise Failed("that is no status of an image server: is this its admin listener?") from exc
    return Status(transfers, workers, taken, lately)


def _lately(answer: dict[str, dict[str, object]]) -> Lately:
    slots = answer.get("slots", {}).items()
    problems = answer.get("readiness", {}).get("failed", ())
    return Lately(
        {plain_text(kind): _slots(fields) for kind, fields in slots},  # type: ignore[arg-type]
        tuple(map(_ended, answer.get("finished", ()))),  # type: ignore[arg-type]
        tuple(map(_ended, answer.get("failed", ()))),  # type: ignore[arg-type]
        {plain_text(why): int(_number(n)) for why, n in answer.get("refusals", {}).items()},
        tuple(plain_text(str(each["problem"])) for each in problems),  # type: ignore[attr-defined]
    )


def _slots(fields: dict[str, object]) -> Slots:
    most = fields["limit_per_image"]
    each = None if most is None else int(_number(most))
    return Slots(int(_number(fields["in_use"])), int(_number(fields["limit"])), each)


def _ended(fields: dict[str, object]) -> Ended:
    return Ended(
        id=plain_text(str(fields["id"])),
        operation=plain_text(str(fields["operation"])),
        client=plain_text(str(fields["client"])),
        status=int(_number(fields["status"])),
        count=int(_number(fields["count"])),
        done=int(_number(fields["done"])),
        seconds=_number(fields["seconds"]),
        ago=_number(fields["ago"]),
        error=plain_text(str(fields.get("error", ""))),
    )


def _running(fields: dict[str, object]) -> Running:
    return Running(
        id=plain_text(str(fields["id"])),
        operation=plain_text(str(fields["operation"])),
        client=plain_text(str(fields["client"])),
        worker=int(_number(fields["worker"])),
        done=int(_number(fields["done"])),
        expected=int(_number(fields["expected"])),
        rate=_number(fields["rate"]),
        age=_number(fields["age"]),
    )


def _worker(fields: dict[str, object]) -> Worker:
    worker, busy = _number(fields["worker"]), _number(fields["busy"])
    return Worker(int(worker), plain_text(str(fields["state"])), int(busy))


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(value)
    return value


def with_rates(now: Status, before: Status) -> Status:
    """Return ``now`` with the rates since ``before``; of what has begun since, the mean."""
    known: dict[tuple[object, ...], list[Running]] = {}
    for transfer in before.transfers:
        known.setdefault(_who(transfer), []).append(transfer)
    elapsed = now.taken - before.taken
    found = []
    for transfer in now.transfers:
        earlier = _match(transfer, known.get(_who(transfer), []), elapsed)
        found.append(_since(transfer, earlier) if earlier else transfer)
    return replace(now, transfers=tuple(found))


def _who(transfer: Running) -> tuple[object, ...]:
    return transfer.worker, transfer.id, transfer.operation, transfer.client, transfer.expected


def _match(transfer: Running, candidates: list[Running], elapsed: float) -> Running | None:
    """Return, and take, the candidate that began when this transfer did."""

    def apart(candidate: Running) -> float:
        return abs(candidate.age + elapsed - transfer.age)

    fitting = [c for c in candidates if c.age < transfer.age and c.done <= transfer.done]
    nearest = min(fitting, key=apart, default=None)
    if nearest is None or apart(nearest) > _SAME_BEGINNING:
        return None
    candidates.remove(nearest)
    return nearest


def _since(transfer: Running, earlier: Running) -> Running:
    rate = (transfer.done - earlier.done) / (transfer.age - earlier.age)
    return replace(transfer, rate=rate)
