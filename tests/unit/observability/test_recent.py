# SPDX-License-Identifier: Apache-2.0
"""What a process has done lately: like operations in one row, and what was touched in cells."""

import json
from pathlib import Path

import pytest

from imageserver.core.entry import Entry
from imageserver.core.ranges import Span
from imageserver.core.recent import CELLS, MOST_ROWS, Ended, Touched, all_touched, recently, runs
from imageserver.core.slots import Kind
from imageserver.observability.recent import MOST_TOUCHED, Recent, ended_in, touched_in
from imageserver.transfers.requests import Request

SIZE = CELLS << 20


def entry(transfer: str = "vm", **fields: object) -> Entry:
    known = Entry("GET", transfer, "read", "nbd", None, 0, 206, "", "", 0.5, "10.0.0.1", "r1")
    return known._replace(**fields)  # type: ignore[arg-type]


def span(cell: int, cells: int = 1, size: int = SIZE) -> Span:
    return Span(cell << 20, (cell + cells) << 20, size)


class Worker:
    """A process with a number of its own."""

    def __init__(self, directory: Path, number: int = 0) -> None:
        self.now = 10**9
        self.recent = Recent(lambda name: f"{directory}/{name}_{number}.json", lambda: self.now)

    def tell(self, *entries: Entry) -> "Worker":
        for each in entries:
            self.recent.finished(each)
        self.recent.flush()
        return self


def test_like_operations_of_all_workers_are_one_row(tmp_path: Path):
    Worker(tmp_path).tell(entry(done=3), entry(done=4), entry("other"))
    late = Worker(tmp_path, 1)
    late.now = 2 * 10**9
    late.tell(entry(done=5))
    found = ended_in(str(tmp_path))
    assert [(row.transfer, row.count, row.done, row.seconds) for row in found.finished] == [
        ("vm", 3, 12, 1.5),
        ("other", 1, 0, 0.5),
    ]
    assert found.finished[0].at_ns == 2 * 10**9
    assert found.failed == ()


def test_what_failed_is_a_row_for_each_reason_and_pushes_nothing_else_out(tmp_path: Path):
    worker = Worker(tmp_path)
    worker.tell(entry("kept"))
    failures = [entry(f"vm{n}", status=503, error="NoSlot") for n in range(2 * MOST_ROWS)]
    worker.tell(*failures, entry("vm", status=409, error="ImageBusy"))
    found = ended_in(str(tmp_path))
    assert [row.transfer for row in found.finished] == ["kept"]
    assert len(found.failed) == MOST_ROWS
    assert (found.failed[0].transfer, found.failed[0].error) == ("vm", "ImageBusy")


def test_probes_and_unknown_ids_are_in_no_row(tmp_path: Path):
    Worker(tmp_path).tell(
        entry(operation="options", status=200),
        entry(operation="head", status=200),
        entry("<b>no-such</b>", backend="", status=404, error="UnknownImage"),
    )
    assert ended_in(str(tmp_path)) == recently([])


def test_a_request_of_a_known_transfer_that_was_refused_early_is_a_failure(tmp_path: Path):
    Worker(tmp_path).tell(entry(operation="put", status=400, error="BadRequest"))
    assert [row.operation for row in ended_in(str(tmp_path)).failed] == ["put"]


def test_a_method_that_a_client_has_made_up_is_not_told(tmp_path: Path):
    refused = {"status": 405, "error": "MethodNotAllowed"}
    Worker(tmp_path).tell(entry(operation="b'x", **refused), entry(operation="brew", **refused))
    (row,) = ended_in(str(tmp_path)).failed
    assert (row.operation, row.count) == ("other", 2)


def test_a_successor_goes_on_with_the_rows_of_one_that_died(tmp_path: Path):
    Worker(tmp_path).tell(entry(done=3), entry(status=500, error="BackendError"))
    Worker(tmp_path).tell(entry(done=4))
    found = ended_in(str(tmp_path))
    assert [(row.count, row.done) for row in found.finished] == [(2, 7)]
    assert [row.error for row in found.failed] == ["BackendError"]


@pytest.mark.parametrize("text", ["", "{", "[1]", '[["x"]]', "{}", "[[1,2,3,4,5,6,7,8,9,{}]]"])
def test_a_damaged_file_is_left_out(tmp_path: Path, text: str):
    Worker(tmp_path).tell(entry(done=3))
    for name in ("recent_1.json", "touched_1.json"):
        (tmp_path / name).write_text(text)
    assert [row.done for row in ended_in(str(tmp_path)).finished] == [3]
    assert list(touched_in(str(tmp_path))) == []


def test_what_cannot_be_written_is_left_out(tmp_path: Path):
    Worker(tmp_path / "gone").tell(entry())
    assert ended_in(str(tmp_path / "gone")) == recently([])


# What was touched


def touched(directory: Path, transfer: str = "vm") -> tuple[list[object], list[object]]:
    found = all_touched(touched_in(str(directory)))[transfer]
    return list(runs(found.read)), list(runs(found.written))


def test_ranges_of_all_workers_are_marked_by_what_was_done_with_them(tmp_path: Path):
    Worker(tmp_path).tell(
        entry(span=span(0, 2), done=2 << 20),
        entry(span=span(1, 2), done=2 << 20, operation="checksum"),
        entry(span=span(9), done=1, operation="write"),
        entry(span=span(7), done=1 << 20, operation="zero"),
        entry(span=span(20, 9), done=5 << 20, status=206, error="ClientGone"),
        entry(span=span(100, 9), done=9 << 20, operation="extents"),
        entry("other", span=span(50), done=1),
    )
    Worker(tmp_path, 1).tell(entry(span=Span(SIZE - 1, SIZE, SIZE), done=1))
    assert touched(tmp_path) == ([(0, 3), (20, 5), (CELLS - 1, 1)], [(7, 1), (9, 1)])


def test_a_request_under_way_has_touched_what_is_done_of_it(tmp_path: Path):
    worker = Worker(tmp_path)
    request = Request("PUT", "10.0.0.1", "r1", underway=worker.recent.underway)
    request.asks_for("vm")
    request.needs("write", Kind.WRITE)
    request.begin(span(3, 9))
    worker.tell()
    assert list(touched_in(str(tmp_path))) == []
    request.progress((1 << 20) + 1)
    worker.tell()
    assert touched(tmp_path) == ([], [(3, 2)])
    request.answered(200)
    request.end()
    assert worker.recent.underway == set()


def test_an_image_of_another_size_begins_anew(tmp_path: Path):
    worker = Worker(tmp_path).tell(entry(span=span(0), done=1))
    worker.tell(entry(span=Span(SIZE, SIZE + 1, 2 * SIZE), done=1))
    assert touched(tmp_path) == ([(CELLS // 2, 1)], [])


def test_of_the_images_of_a_process_those_touched_last_are_known(tmp_path: Path):
    names = [f"vm{n}" for n in range(MOST_TOUCHED + 1)]
    worker = Worker(tmp_path).tell(*(entry(name, span=span(0), done=1) for name in names[:-1]))
    worker.tell(entry(names[0], span=span(0), done=1), entry(names[-1], span=span(0), done=1))
    known = {each.transfer for each in touched_in(str(tmp_path))}
    assert set(names) - known == {names[1]}


def test_the_rows_are_bounded_before_they_are_made_up(tmp_path: Path):
    worker = Worker(tmp_path)
    for _ in range(10_000):
        worker.recent.finished(entry(done=1))
    assert len(worker.recent._new) <= 4096
    worker.tell()
    assert [row.count for row in ended_in(str(tmp_path)).finished] == [10_000]


def test_a_file_is_written_only_where_something_is_new(tmp_path: Path):
    worker = Worker(tmp_path).tell(entry())
    (tmp_path / "recent_0.json").unlink()
    worker.tell()
    assert not (tmp_path / "recent_0.json").exists()


def test_runs_of_bits():
    assert list(runs(0b1101110)) == [(1, 3), (5, 2)]
    assert list(runs(0)) == []
    assert list(runs((1 << CELLS) - 1)) == [(0, CELLS)]


def test_rows_are_what_json_holds(tmp_path: Path):
    Worker(tmp_path).tell(entry(done=1))
    ((*row,),) = json.loads((tmp_path / "recent_0.json").read_text())
    assert Ended(*row).count == 1


def test_of_several_sizes_of_an_image_the_largest_counts():
    known = [Touched("a", 1, 1, 1), Touched("a", 2, 2, 2), Touched("a", 1, 4, 4)]
    assert all_touched(known) == all_touched(known[::-1]) == {"a": Touched("a", 2, 2, 2)}
