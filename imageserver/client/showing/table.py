# SPDX-License-Identifier: Apache-2.0
"""From what ``/status`` says (docs/api.md) to what ``imagectl top`` shows; no I/O, no clock.

The server tells how much of each transfer is done and how old it is, so the rate of now is
what was added between two polls over by how much the transfer has aged meanwhile: how long
the polls themselves took does not matter. Polls know a transfer again by who does what with
which image, and by when it began, which its age tells to about a network delay.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

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
class Status:
    """What a server does at one moment, ``taken`` on our clock."""

    transfers: tuple[Running, ...]
    workers: tuple[Worker, ...]
    taken: float

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
    except (KeyError, TypeError, ValueError) as exc:
        raise Failed("that is no status of an image server: is this its admin listener?") from exc
    return Status(transfers, workers, taken)


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


def with_rates(now: Status, before: Status | None) -> Status:
    """Return ``now`` with the rates since ``before``; of what has begun since, the mean."""
    if before is None:
        return now
    known: dict[tuple[object, ...], list[Running]] = {}
    for transfer in before.transfers:
        known.setdefault(_who(transfer), []).append(transfer)
    elapsed = now.taken - before.taken
    found = []
    for transfer in now.transfers:
        earlier = _match(transfer, known.get(_who(transfer), []), elapsed)
        found.append(_since(transfer, earlier) if earlier else transfer)
    return Status(tuple(found), now.workers, now.taken)


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


#: Eighths of a character.
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def bar(share: float | None, width: int, *, plain: bool) -> str:
    """Draw a bar; full only when all is done, and dots where nobody knows of how much."""
    if share is None:
        return "." * width if plain else "·" * width
    if plain:
        return ("#" * int(share * width)).ljust(width, "-")
    eighths = int(share * width * 8)
    full = "█" * (eighths // 8)
    return (full + (_EIGHTHS[eighths % 8] if eighths % 8 else "")).ljust(width)


def workers_line(workers: Sequence[Worker]) -> str:
    """Say in one line what the workers do."""
    if not workers:
        return "no worker"
    busy = sum(worker.busy for worker in workers)
    states: dict[str, int] = {}
    for worker in workers:
        states[worker.state] = states.get(worker.state, 0) + 1
    said = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    each = " ".join(f"{worker.worker}:{worker.busy}" for worker in workers)
    return f"workers: {said}; busy threads: {busy} ({each})"
