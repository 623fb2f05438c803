"""What the gateway's log adds up to: each record once, however the spans of the runs meet."""

from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gwproxy.core.reconcile import Theirs
from gwproxy.storage.gateway_sums import HOUR_MS, Sum
from gwproxy.storage.reconcile import Book, book, sums

DAY = 20_500
START = DAY * 24 * HOUR_MS
MINUTE = 60_000
NAMED = [("google-ai-studio", "gemini")]


def theirs(minute: int, cost: int = 5) -> Theirs:
    return Theirs(
        f"log_{minute}", START + minute * MINUTE, "google-ai-studio", "pro", minute % 3 > 0,
        minute % 5 == 0, 200, 10, 2, cost, None, None, 100,
    )  # fmt: skip


ALL = range(0, 240, 2)


class Runs:
    """Runs one after the other, each of which sees what the log has of its span."""

    def __init__(self, kept: Book, path: Path) -> None:
        self.kept, self.path, self.number = kept, path, count()

    def __call__(self, since: int, until: int, cost: int = 5) -> None:
        self.kept.begin(f"run {next(self.number)}")
        # Both sides are read a little beyond the span.
        self.kept.put(theirs(m, cost) for m in ALL if since - 15 <= m < until + 15)
        self.kept.match()
        self.kept.add_up(START + since * MINUTE, START + until * MINUTE, NAMED)

    def total(self) -> Sum:
        [one] = sums(self.path, DAY, DAY)
        return one


def test_spans_that_meet_within_an_hour_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "book.db"
    with book(path) as kept:
        run = Runs(kept, path)
        run(0, 90)
        run(90, 180)
        assert run.total() == Sum(
            "gemini", "pro", 90, 30, 18, 900, 180, 450, 9_000, 180 * MINUTE
        )  # fmt: skip


def test_the_second_look_at_a_part_is_the_one_that_counts(tmp_path: Path) -> None:
    path = tmp_path / "book.db"
    with book(path) as kept:
        run = Runs(kept, path)
        run(0, 90, cost=0)  # figures that had not come yet
        run(0, 120, cost=5)
        assert (run.total().requests, run.total().cost) == (60, 300)
        run(30, 75, cost=7)  # of a part alone nothing is known that could be taken away
        assert (run.total().requests, run.total().cost) == (60, 300)
        assert sums(path, DAY + 1, DAY + 1) == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 239), st.integers(1, 200)), min_size=1, max_size=8))
def test_each_record_of_all_the_spans_is_counted_once(spans: list[tuple[int, int]]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "book.db"
        seen: set[int] = set()
        with book(path) as kept:
            run = Runs(kept, path)
            for since, minutes in spans:
                until = min(since + minutes, 240)
                run(since, until)
                seen.update(range(since, until))
        found = sums(path, DAY, DAY)
        assert sum(one.requests for one in found) == len(seen.intersection(ALL))
        if found:
            assert found[0].covered_ms == len(seen) * MINUTE


@pytest.mark.parametrize("span", [(10, 10), (11, 10)])
def test_a_span_without_length_changes_nothing(tmp_path: Path, span: tuple[int, int]) -> None:
    path = tmp_path / "book.db"
    with book(path) as kept:
        run = Runs(kept, path)
        run(0, 60)
        before = run.total()
        run(*span)
        assert run.total() == before
