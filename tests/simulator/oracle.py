"""The oracle: the ledger once more, from the bytes of its journal and a few rules of its own.

It shares no code with the gateway: records are read as plain JSON, sums are made anew, periods come
from the calendar. Whatever it does not like is raised as Wrong.
"""

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from tests.simulator.upstream import Upstream

Key = tuple[str, str]

KEPT_MS = 86_400_000
"""Memory may forget the keys of older requests."""


class Wrong(Exception):
    """A promise that was not kept."""


def check(fine: bool, *words: object) -> None:
    if not fine:
        raise Wrong(" ".join(map(str, words)))


@dataclass
class Open:
    """A reservation that has not ended."""

    id: str
    holds: list[list[Any]]
    provider: str
    hidden: bool
    mark: int | None = None
    later: bool = False
    """It has had more than one attempt."""

    def if_orphaned(self) -> int:
        """What is to be charged when nobody is left to tell."""
        amount = int(self.holds[0][2])
        if self.mark is None:
            return amount
        return max(amount, self.mark) if self.hidden else self.mark


@dataclass
class Sums:
    spent: int = 0
    credited: int = 0
    count: int = 0
    held: int = 0
    overrun: int = 0

    def figures(self) -> tuple[int, int, int, int]:
        return self.spent, self.credited, self.count, self.held


@dataclass
class Ended:
    """A reservation's one end."""

    id: str
    cost: int
    outcome: str
    due: int
    """What it should have been charged if nobody was left to settle it."""
    holds: list[list[Any]]
    hidden: bool
    adjusted: int = 0


@dataclass
class Fold:
    """All that follows from the records so far."""

    lsn: int = 0
    t: int = 0
    sums: dict[Key, Sums] = field(default_factory=dict)
    open: dict[int, Open] = field(default_factory=dict)
    ended: dict[int, Ended] = field(default_factory=dict)
    rows: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    closed: int = 0
    keys: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Idempotency keys: the records that they led to, and when."""

    def of(self, account: str, period: str) -> Sums:
        return self.sums.setdefault((account, period), Sums())

    def limit(self, account: str) -> int | None:
        """As the directory's rows say; providers and outages have other sources too."""
        scope, _, name = account.partition(":")
        row = self.rows.get((scope, name))
        if row is None:
            return None
        return row["monthly_budget" if scope == "org" else "monthly_limit"]

    def feed(self, record: dict[str, Any]) -> None:
        lsn, kind = record["lsn"], record["k"]
        check(lsn == self.lsn + 1, f"record {lsn} after {self.lsn}")
        check(record["t"] >= self.t, f"record {lsn} is older than the one before it")
        check(record["synced"] < lsn, f"record {lsn} says that it is on the disk itself")
        if kind == "reserve":
            self._hold(record["holds"], 1)
            self.open[lsn] = Open(
                record["id"], record["holds"], record["p"], record.get("hidden", False)
            )
        elif kind in ("mark", "attempt"):
            reservation = self._opened(record)
            if record.get("holds"):
                self._hold(reservation.holds, -1)
                self._hold(record["holds"], 1)
                reservation.holds = record["holds"]
            if kind == "mark":
                reservation.mark = record["cost"]
            else:
                reservation.mark = None
                reservation.later = True
                reservation.hidden = record.get("hidden", False)
                reservation.provider = record["p"]
        elif kind == "settle":
            self._settle(record)
        elif kind == "adjust":
            for account, period in record["accounts"]:
                sums = self.of(account, period)
                if record["type"] == "grant":
                    sums.credited += record["delta"]
                else:
                    sums.spent += record["delta"]
            if record.get("r") is not None:
                ended = self.ended.get(record["r"])
                check(ended is not None, "an adjustment of a request that has not ended")
                assert ended is not None
                ended.adjusted += record["delta"]
        elif kind == "close":
            key = (record["account"], record["period"])
            figures = (record["spent"], record.get("credited", 0), record.get("count", 0), 0)
            sums = self.sums.pop(key, Sums())
            check(sums.figures() == figures, "closed with", figures, "and not", sums.figures())
            self.closed += 1
        elif kind == "admin":
            for noun, name in (("org", "org_id"), ("user", "user_id"), ("key", "key_id")):
                row = record.get(noun)
                if row is not None:
                    self.rows[noun, row[name]] = row
        if record.get("idempotency_key") is not None:
            check(record["idempotency_key"] not in self.keys, "an idempotency key was used twice")
            self.keys[record["idempotency_key"]] = (lsn, record["t"])
        self.lsn, self.t = lsn, record["t"]

    def _opened(self, record: dict[str, Any]) -> Open:
        reservation = self.open.get(record["r"])
        check(reservation is not None, record["k"], "is not about an open one:", record["r"])
        assert reservation is not None
        return reservation

    def _settle(self, record: dict[str, Any]) -> None:
        reservation = self._opened(record)
        del self.open[record["r"]]
        self._hold(reservation.holds, -1)
        shares = self._shares(reservation, record)
        for account, period, hold, *_ in reservation.holds:
            amount = shares.get(account, record["cost"])
            sums = self.of(account, period)
            sums.spent += amount
            sums.count += record["outcome"] != "void"
            sums.overrun += max(0, amount - hold)
        check(record["cost"] >= 0, "a negative cost")
        self.ended[record["r"]] = Ended(
            reservation.id,
            record["cost"],
            record["outcome"],
            reservation.if_orphaned(),
            reservation.holds,
            reservation.hidden,
        )

    @staticmethod
    def _shares(reservation: Open, record: dict[str, Any]) -> dict[str, int]:
        """What of the cost is each provider's own."""
        last, rest = f"provider:{reservation.provider}", record["cost"]
        others = {
            held[0]: held[2]
            for held in reservation.holds
            if held[0].startswith("provider:") and held[0] != last
        }
        if not reservation.later:
            return {last: rest}
        if record.get("attempts"):
            shares = dict.fromkeys((*others, last), 0)
            for tried in record["attempts"]:
                if f"provider:{tried[0]}" in shares:
                    shares[f"provider:{tried[0]}"] += tried[6]
            return shares
        shares = {}
        for name, hold in others.items():
            shares[name] = min(hold, rest)
            rest -= shares[name]
        return {**shares, last: rest}

    def _hold(self, holds: list[list[Any]], sign: int) -> None:
        for account, period, hold, *_ in holds:
            sums = self.of(account, period)
            sums.held += sign * hold
            check(sums.held >= 0, "less than nothing is held on", account, period)


def periods_of(t: int) -> tuple[str, str]:
    day = datetime.fromtimestamp(t // 1000, UTC).strftime("%Y-%m-%d")
    return day[:7], day


class Oracle:
    """What was acknowledged, what follows from it, and what the world outside says to that."""

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream
        self.fold = Fold()
        self.history: list[bytes] = []
        """Every record that was acknowledged, by number."""
        self.safe = 0
        """The last one that a kill cannot lose; the ones after it were of unknown outcome."""
        self.tried: dict[int, list[bytes]] = {}
        """By number: what somebody tried to write, in this life."""
        self.provider_daily: dict[str, int] = {}
        self.outage_daily = 0
        self.in_force: dict[str, tuple[int, int]] = {}
        """Limits of users that are in force and not recorded yet, with their row's version."""

    # -- while it runs -----------------------------------------------------------------------------

    def wrote(self, payload: bytes, *, certain: bool, degraded: bool) -> None:
        """The journal has taken this record."""
        record = json.loads(payload)
        self._look_at(record, degraded)
        self.fold.feed(record)
        self._recorded(record)
        self.history.append(payload)
        if certain:
            self.safe = len(self.history)

    def _recorded(self, record: dict[str, Any]) -> None:
        """From here on the user's row says what his limit is."""
        row = record.get("user")
        if row is not None:
            account = f"user:{row['user_id']}"
            _, version = self.in_force.get(account, (0, 0))
            if row.get("version", 1) >= version:
                self.in_force.pop(account, None)

    def _look_at(self, record: dict[str, Any], degraded: bool) -> None:
        """What each decision has to be like at the moment at which it is made."""
        kind, fold = record["k"], self.fold
        before: dict[Key, int] = {}
        if kind == "mark":
            self._look_at_mark(record)
        if kind == "reserve":
            month, day = periods_of(record["t"])
            for account, period, *_ in record["holds"]:
                daily = account.startswith(("provider:", "outage:"))
                check(period == (day if daily else month), "held in", period, "at", month, day)
            outage = [held for held in record["holds"] if held[0].startswith("outage:")]
            check(bool(outage) == degraded, "outage account", outage, "database lost", degraded)
            check(record.get("degraded", False) == degraded, "a wrong word on the database")
            taken = [o.id for o in fold.open.values()] + [e.id for e in fold.ended.values()]
            check(record["id"] not in taken, "a request id was used twice")
        elif kind in ("mark", "attempt") and record.get("holds"):
            reservation = fold.open.get(record["r"])
            if reservation is None:
                return  # the fold says so
            before = {(held[0], held[1]): held[2] for held in reservation.holds}
            check(
                {h[:2][0] for h in record["holds"] if not h[0].startswith("provider:")}
                == {h[0] for h in reservation.holds if not h[0].startswith("provider:")},
                "a reservation moved to other accounts",
            )
        else:
            return
        for account, period, hold, limit, total in record["holds"]:
            sums = fold.of(account, period)
            was = before.get((account, period), 0)
            check(
                total == sums.spent + sums.held - was + hold,
                f"{kind} {record['lsn']} says {total} on {account}, and it is",
                sums.spent + sums.held - was + hold,
            )
            expected = self._limit(account)
            if expected is not None:
                expected += sums.credited
            check(
                limit == expected, f"{kind} {record['lsn']}: {limit} for {account}, not", expected
            )
            if hold > was and limit is not None:
                check(total <= limit, f"{account} {period} overrun: {total} of {limit}")

    def _look_at_mark(self, record: dict[str, Any]) -> None:
        """In an outage nothing is relayed above what is held, whatever the policies, unless the
        upstream itself goes beyond the maximum that it was sent."""
        reservation = self.fold.open.get(record["r"])
        if reservation is None:
            return  # the fold says so
        calls = self.upstream.stories[reservation.id].calls
        for account, _, hold, *_ in record.get("holds") or reservation.holds:
            if account.startswith("outage:") and calls[-1].limit is None:
                check(record["cost"] <= hold, f"mark {record['lsn']} is above", hold, account)

    def _limit(self, account: str) -> int | None:
        scope, _, name = account.partition(":")
        if scope == "provider":
            return self.provider_daily.get(name)
        if scope == "outage":
            own = self.fold.rows["org", name]["fallback_daily_limit"]
            return self.outage_daily if own is None else own
        in_force = self.in_force.get(account)
        return self.fold.limit(account) if in_force is None else in_force[0]

    def compare(self, lsn: int, t: int, balances: Any, holds: Any, keys: Any) -> None:
        """Memory says what follows from the records."""
        records = (self.fold.lsn, self.fold.t)
        check((lsn, t) == records, "memory is at", (lsn, t), "the records at", records)
        ours = {key: sums.figures() for key, sums in self.fold.sums.items() if any(sums.figures())}
        theirs = {
            key: balance.figures() for key, balance in balances.items() if any(balance.figures())
        }
        check(ours == theirs, "memory and records differ:", _difference(ours, theirs))
        check(
            {r: o.if_orphaned() for r, o in self.fold.open.items()}
            == {r: hold.recovered_cost() for r, hold in holds.items()},
            "memory and records differ in what is open",
        )
        recent = {key: made for key, made in self.fold.keys.items() if made[1] > t - KEPT_MS}
        check(recent.items() <= keys.items(), "an idempotency key was forgotten")

    # -- after a crash -----------------------------------------------------------------------------

    def survived(self, lsn: int, *, power_cut: bool, synced: int, liar: bool) -> None:
        """The ledger goes on after record `lsn`. Nothing that had to last may be missing."""
        known = len(self.history)
        if lsn > known:  # one was being written when the process was killed
            check(lsn == known + 1 and lsn in self.tried, "a record that nobody wrote:", lsn)
            self.history.append(self.tried[lsn][-1])
        if not liar:
            least = synced if power_cut else self.safe
            check(lsn >= least, f"records {lsn + 1} to {least} are lost, power cut: {power_cut}")
        del self.history[lsn:]
        self.safe = lsn
        self.fold = Fold()
        for payload in self.history:
            self.fold.feed(json.loads(payload))
        self.tried = {}
        self.in_force = {}

    # -- at rest -----------------------------------------------------------------------------------

    def at_rest(self, *, lost: set[str], full: bool, liar: bool) -> None:
        """Every request that reached the upstream stands in the ledger once, at what it cost.

        `lost`: requests of whose records a power cut took some. In `normal` they may be missing;
        in `full` they are there, at their last watermark that was synced.
        """
        fold = self.fold
        check(not fold.open, "still held:", sorted(fold.open))
        for (account, period), sums in fold.sums.items():
            check(sums.held == 0, "held on", account, period)
            if account.startswith("outage:"):
                limit = self._limit(account)
                assert limit is not None
                check(sums.spent - sums.overrun <= limit, account, "cost", sums.spent, "of", limit)
        by_id = {ended.id: ended for ended in fold.ended.values()}
        check(len(by_id) == len(fold.ended), "a request stands in the ledger twice")
        for request_id, each in self.upstream.stories.items():
            if each.calls and request_id not in by_id:
                allowed = liar or (request_id in lost and not full)
                check(allowed, request_id, "was sent upstream and is not in the ledger")
        for ended in by_id.values():
            story = self.upstream.stories.get(ended.id)
            calls = story.calls if story is not None else []
            if ended.outcome == "recovered":
                check(ended.cost == ended.due, "not recovered at what was due:", ended)
                # What thinks out of sight is charged its hold, whatever could be seen of it.
                if not liar and ended.id not in lost and not ended.hidden:
                    least = sum(call.least() for call in calls)
                    check(ended.cost >= least, ended.id, "recovered below", least)
            elif ended.outcome == "void":
                check(not calls, ended.id, "was sent, and is void")
                check(ended.cost == 0, "a void request with a cost")
            else:
                assert story is not None, ended.id
                least, most = story.bounds()
                check(least <= ended.cost <= most, ended, "not", least, "to", most, story)
                if ended.outcome == "cut":
                    check(ended.cost <= ended.holds[0][2], "cut, and above what was held:", ended)
                if any(held[0].startswith("outage:") for held in ended.holds):
                    seen = story.unbidden()
                    check(seen <= ended.holds[0][2], "above what was held in an outage:", ended)


def _difference(ours: dict[Key, Any], theirs: dict[Key, Any]) -> str:
    return "; ".join(
        f"{key}: {theirs.get(key)} in memory, {ours.get(key)} recorded"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
    )
