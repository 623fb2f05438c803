"""The running ledger: the one way in which its state changes. Check, record, apply, in one step.

Nothing here awaits. A record that could not be written leaves no trace; one of which nobody knows
whether it was written counts as written. What must be recorded and could not be is owed: it is
recorded before anything new is let in.
"""

from collections import deque
from collections.abc import Callable
from typing import Final, TypedDict

from msgspec.structs import replace

from gwproxy.core.errors import StorageUnavailable
from gwproxy.core.ledger import Key, Request, State, Touched, admitted, apply
from gwproxy.core.period import periods
from gwproxy.core.records import NO_TOKENS, Adjust, AnyRecord, Settle, encode
from gwproxy.storage.journal import Journal, NotWritten, OutcomeUnknown

SETTLEMENT_ROOM_BYTES: Final = 8 * 1024
"""Kept free in the journal for each open reservation: its marks and its settlement must fit."""

JUMP_MS: Final = 300_000
"""A wall clock that runs away from the monotonic one by more than this is not believed at once."""

BELIEVED_AFTER_MS: Final = 60_000
"""But is once it has kept its new time for so long: then somebody has set it on purpose."""

RETRY_AFTER_S: Final = 5

RECENT: Final = 4096
"""Requests kept in memory for their callers to ask about: some megabytes."""


class Stamp(TypedDict):
    """What every record begins with: `Settle(**ledger.stamp(), r=...)`."""

    lsn: int
    t: int
    synced: int


class NotRecorded(StorageUnavailable):
    """The record is not in the journal, and nothing has changed."""


class RecordUncertain(StorageUnavailable):
    """The record may be in the journal, and was applied: it has to be undone by another one."""


class Clock:
    """Ledger time: the wall clock, which neither goes back nor leaps."""

    def __init__(self, wall: Callable[[], float], monotonic: Callable[[], float]) -> None:
        """Both give seconds; `wall` since 1970."""
        self._wall = wall
        self._monotonic = monotonic
        self._ahead_ms = self._gap_ms()
        self._since_ms: int | None = None
        """When the wall clock was first seen to have leapt, in monotonic milliseconds."""
        self._leap_ms = 0

    def now_ms(self) -> int:
        wall_ms = int(self._wall() * 1000)
        monotonic_ms = int(self._monotonic() * 1000)
        leap_ms = wall_ms - monotonic_ms - self._ahead_ms
        if -JUMP_MS <= leap_ms <= JUMP_MS:
            self._since_ms = None
            return wall_ms
        if self._since_ms is None or abs(leap_ms - self._leap_ms) > JUMP_MS:
            self._since_ms, self._leap_ms = monotonic_ms, leap_ms
        if leap_ms < 0 or monotonic_ms - self._since_ms >= BELIEVED_AFTER_MS:
            self.confirm()
            return wall_ms
        return monotonic_ms + self._ahead_ms

    def confirm(self) -> None:
        """The wall clock is right as it is."""
        self._ahead_ms = self._gap_ms()
        self._since_ms = None

    @property
    def doubted(self) -> bool:
        return self._since_ms is not None

    def _gap_ms(self) -> int:
        return int(self._wall() * 1000) - int(self._monotonic() * 1000)


class Recent:
    """The last settlements: what a caller asks about is nearly always among them."""

    def __init__(self, most: int = RECENT) -> None:
        self._most = most
        self._order: deque[str] = deque()
        self._settled: dict[str, Touched] = {}

    def add(self, touched: Touched) -> None:
        assert touched.hold is not None, "a settlement has a reservation"
        request_id = touched.hold.reserve.id
        self._settled[request_id] = touched
        self._order.append(request_id)
        if len(self._order) > self._most:
            self._settled.pop(self._order.popleft(), None)

    def find(self, request_id: str) -> Request | None:
        touched = self._settled.get(request_id)
        return None if touched is None else touched.request

    def of_key(self, key_id: str, most: int) -> list[Request]:
        """The newest ones of a key, newest first."""
        found: list[Request] = []
        for request_id in reversed(self._order):
            touched = self._settled[request_id]
            if touched.reserve is not None and touched.reserve.key_id == key_id:
                request = touched.request
                assert request is not None, "a settlement is about a request"
                found.append(request)
                if len(found) == most:
                    break
        return found


class Ledger:
    """The state and the journal that it is recorded in."""

    def __init__(
        self,
        state: State,
        journal: Journal,
        clock: Callable[[], int],
        recent: Recent | None = None,
    ) -> None:
        """`state` stands at the journal's last record; `clock` gives milliseconds since 1970;
        `recent` has the requests that the database may not have yet."""
        assert state.lsn + 1 == journal.next_lsn, "the state and the journal have parted"
        self.state = state
        self.journal = journal
        self._clock = clock
        self._owed: deque[Callable[[], object]] = deque()
        self.recent = Recent() if recent is None else recent
        self.since = ""
        """Balances of earlier months are not in memory, unless they were fetched."""
        self.fetched: set[Key] = set()
        """Of those, what was looked for: where it is not in memory, there is none."""
        self.posted: Callable[[], None] = _nobody
        """Called after each record."""

    # -- time --------------------------------------------------------------------------------------

    def now_ms(self) -> int:
        """Ledger time: it never goes back behind a record."""
        return max(self.state.t, self._clock())

    def periods(self) -> tuple[str, str]:
        """The month and the day of ledger time, from one look at the clock."""
        return periods(self.now_ms())

    # -- records -----------------------------------------------------------------------------------

    def stamp(self) -> Stamp:
        return {"lsn": self.state.lsn + 1, "t": self.now_ms(), "synced": self.journal.synced}

    def post(self, record: AnyRecord) -> Touched:
        """Write `record` and apply it. NotRecorded: nothing happened; RecordUncertain: it did."""
        if type(record) is Adjust:
            self._assert_there(record)
        try:
            self.journal.write(encode(record))
        except NotWritten as error:
            raise NotRecorded(_UNAVAILABLE, retry_after_s=RETRY_AFTER_S) from error
        except OutcomeUnknown as error:
            self._apply(record)
            raise RecordUncertain(_UNAVAILABLE, retry_after_s=RETRY_AFTER_S) from error
        return self._apply(record)

    def _assert_there(self, record: Adjust) -> None:
        """A balance that memory has let go would begin at nothing here, and go on in the tables."""
        for key in record.accounts:
            there = key[1] >= self.since or key in self.state.balances or key in self.fetched
            assert there, f"{key} is to be fetched before it is adjusted: see `Archive.fetch`"

    def _apply(self, record: AnyRecord) -> Touched:
        touched = apply(self.state, record)
        if isinstance(record, Settle):
            self.recent.add(touched)
        self.posted()
        return touched

    def find(self, request_id: str) -> Request | None:
        """A request that is open, or was settled not long ago."""
        for hold in self.state.holds.values():
            if hold.reserve.id == request_id:
                return admitted(hold)
        return self.recent.find(request_id)

    def admit(self) -> None:
        """Before anything new: what is owed is recorded, and room for settlements is left.

        StorageUnavailable where that is not so.
        """
        if self._owed:
            self.pay()
        journal = self.journal
        needed = (len(self.state.holds) + 1) * SETTLEMENT_ROOM_BYTES
        if journal.lost is not None or journal.room() < needed:
            raise NotRecorded(_UNAVAILABLE, retry_after_s=RETRY_AFTER_S)

    # -- what is owed ------------------------------------------------------------------------------

    @property
    def owes(self) -> int:
        return len(self._owed)

    def must(self, record: Callable[[], object]) -> None:
        """Do what posts a record that cannot be left out; where it fails, as soon as it can be.

        After RecordUncertain the record counts, so it is not made a second time.
        """
        if not self._owed:
            try:
                record()
                return
            except RecordUncertain:
                return
            except NotRecorded:
                pass
        self._owed.append(record)

    def settle(self, record: Settle) -> None:
        """Post the end of a reservation, which cannot be left out: see `must`."""
        if not self._owed:
            try:
                self.post(record)
                return
            except RecordUncertain:
                return
            except NotRecorded:
                pass
        # By then it has another number and time.
        self._owed.append(lambda: self.post(replace(record, **self.stamp())))

    def pay(self) -> None:
        """Record what is owed, in its order; StorageUnavailable when some of it is left."""
        while self._owed:
            try:
                self._owed[0]()
            except RecordUncertain as error:
                self._owed.popleft()
                # That one counts. But of what the caller came to record nothing was tried.
                raise NotRecorded(_UNAVAILABLE, retry_after_s=RETRY_AFTER_S) from error
            self._owed.popleft()

    def void(self, reservation: int) -> None:
        """Take back a reservation of which nothing was sent."""

        self.settle(
            Settle(
                **self.stamp(),
                r=reservation,
                cost=0,
                tokens=NO_TOKENS,
                source="counted",
                outcome="void",
            )
        )

    def recover(self) -> int:
        """Settle the reservations that nobody owns: those of the process before. How many."""
        orphans = list(self.state.holds.items())
        for lsn, hold in orphans:
            cost = hold.recovered_cost()
            self.post(
                Settle(
                    **self.stamp(),
                    r=lsn,
                    cost=cost,
                    tokens=(hold.reserve.prompt, 0, 0, hold.tokens, 0),
                    source="estimated",
                    outcome="recovered",
                    overrun=max(0, cost - hold.amount),
                )
            )
        return len(orphans)


def _nobody() -> None:
    """Nobody waits for records yet."""


_UNAVAILABLE: Final = "The gateway's storage is not available at the moment."
