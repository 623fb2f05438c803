"""One run of the reconciliation: both sides into the book, matched there, compared line by line.

What follows is written down and left to whoever runs it: nothing here changes the ledger.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from gwproxy.cloudflare.logs import Fetched
from gwproxy.core.period import rfc3339
from gwproxy.core.reconcile import (
    EXPLAINED,
    LEFT_OUT,
    Finding,
    Kind,
    Ours,
    Price,
    Theirs,
    compare,
    correction,
    unclaimed,
)
from gwproxy.storage.reconcile import Book

MARGIN_MS: Final = 15 * 60_000
"""Both sides are read so much beyond the span: no request and no clock is further off."""
_HOLES: Final = 100
"""A log that lacks one in so many finished requests is not whole: what it does not have says
nothing about whether it got there."""

_SHOWN_NANOS: Final = 1_000
"""A millionth of a dollar: below it stands what rounding leaves."""


@dataclass(slots=True)
class Line:
    """All lines of one kind, in nano-USD."""

    count: int = 0
    ours: int = 0
    theirs: int = 0
    drift: int = 0
    """Theirs less ours."""

    def add(self, finding: Finding) -> None:
        self.count += 1
        self.ours += finding.ours_cost
        self.theirs += finding.theirs_cost or 0
        if finding.kind is Kind.THEIRS_ONLY or finding.theirs_cost is not None:
            self.drift += (finding.theirs_cost or 0) - finding.ours_cost


@dataclass(slots=True)
class Summary:
    since: int
    until: int
    oldest: int | None
    """The first row that the log still has."""
    kinds: dict[Kind, Line] = field(default_factory=dict)
    drift: Counter[str] = field(default_factory=Counter)
    """By provider, of requests alone: nobody is charged for what the doctor asks."""
    hidden: Line = field(default_factory=Line)
    """Equal lines whose reasoning the log leaves out."""
    again: int = 0
    """Lines of theirs alone that are a second record of one of our attempts."""
    unexplained: int = 0
    """Lines that differ and that no correction puts right."""
    corrections: int = 0
    delta: int = 0
    """What the corrections add to the ledger, in nano-USD."""
    log_is_whole: bool = True
    fetched: Fetched = field(default_factory=Fetched)

    @property
    def agrees(self) -> bool:
        """Whether there is nothing that somebody has to look into, to apply, or to ask again."""
        return not self.corrections and not self.unexplained and not self.unfinished

    @property
    def late(self) -> int:
        """Rows of the span whose figures were not there yet; the margin's are nobody's concern."""
        return sum(self.since <= t < self.until for t in self.fetched.late.values())

    @property
    def unfinished(self) -> bool:
        """Whether the log has more to say of the span than it did."""
        return bool(self.late or self.fetched.missing)

    @property
    def drifts(self) -> bool:
        """Whether the two sides' sums differ by as much as is shown of them."""
        return any(abs(drift) >= _SHOWN_NANOS for drift in self.drift.values())

    def row(self) -> dict[str, Any]:
        """As it is kept for the server, and printed for programs. Amounts are nano-USD."""
        return {
            "from": rfc3339(self.since),
            "to": rfc3339(self.until),
            "oldest_log": None if self.oldest is None else rfc3339(self.oldest),
            "kinds": {
                kind.value: {
                    "count": line.count,
                    "ours_nanos": line.ours,
                    "theirs_nanos": line.theirs,
                    "drift_nanos": line.drift,
                }
                for kind, line in sorted(self.kinds.items())
            },
            "drift_nanos": dict(sorted(self.drift.items())),
            "corrections": {"count": self.corrections, "delta_nanos": self.delta},
            "unexplained": self.unexplained,
            "log_is_whole": self.log_is_whole,
            "repeated": self.fetched.repeated,
            "unreadable": self.fetched.unreadable,
            "missing": self.fetched.missing,
            "late": self.late,
        }


class Sink(Protocol):
    """Where lines go: a file for people, or nowhere."""

    def __call__(self, ours: Ours | None, theirs: Theirs | None, finding: Finding) -> None: ...


def nowhere(ours: Ours | None, theirs: Theirs | None, finding: Finding) -> None:
    """Nobody wants the lines."""


def settle(
    book: Book,
    since: int,
    until: int,
    *,
    oldest: int | None,
    price: Price,
    now_ms: int,
    fetched: Fetched,
    sink: Sink = nowhere,
    named: Callable[[str], str] = str,
) -> Summary:
    """Compare what the book has of a span. `named` turns the gateway's name of a provider into
    ours."""
    book.match()
    summary = Summary(since, until, oldest, fetched=fetched)
    matched, holes, first, last = book.paired()
    summary.log_is_whole = holes * _HOLES <= matched and not fetched.missing

    def note(ours: Ours | None, theirs: Theirs | None, finding: Finding) -> None:
        line = summary.kinds.setdefault(finding.kind, Line())
        line.add(finding)
        provider = ours.provider if ours else named(theirs.provider) if theirs else ""
        if finding.why == LEFT_OUT:
            summary.hidden.add(finding)
        if finding.theirs_cost is not None and finding.kind is not Kind.DOCTOR:
            summary.drift[provider] += finding.theirs_cost - finding.ours_cost
        sink(ours, theirs, finding)

    with book.noting_corrections() as keep:
        for request in book.requests(since, until):
            adjusted = request[0][1]
            lines = [
                (ours, rows, _aged(compare(ours, rows, price, now_ms), ours, oldest))
                for ours, _, rows in request
            ]
            whole = summary.log_is_whole and first <= lines[0][0].t <= last
            follows, done = correction(
                [(ours, finding) for ours, _, finding in lines], adjusted, log_is_whole=whole
            )
            for ours, rows, finding in lines:
                shown = _done(finding) if done else finding
                summary.unexplained += follows is None and shown.kind not in EXPLAINED
                note(ours, rows[0] if rows else None, shown)
            if follows is not None:
                keep(follows)
                summary.corrections += 1
                summary.delta += follows.cost - follows.charged
        for theirs, known in book.unclaimed(since, until):
            finding = unclaimed(theirs, known=known, now_ms=now_ms)
            summary.unexplained += finding.kind not in EXPLAINED
            summary.again += known and finding.kind is Kind.THEIRS_ONLY
            note(None, theirs, finding)
    return summary


def _aged(finding: Finding, ours: Ours, oldest: int | None) -> Finding:
    """A line from before the log's first row: that it has none says nothing."""
    if finding.kind is Kind.OURS_ONLY and oldest is not None and ours.t < oldest:
        return Finding(Kind.TOO_OLD, finding.ours_cost, None, "the log does not go back so far")
    return finding


def _done(finding: Finding) -> Finding:
    """A line whose request was corrected before is in order now."""
    if finding.real_cost is None and finding.kind is not Kind.OURS_ONLY:
        return finding
    real = finding.real_cost or 0
    return Finding(Kind.EQUAL, real, finding.theirs_cost, f"corrected before: {finding.why}")
