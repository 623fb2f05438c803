"""What the tests of money share: the books of one gateway over a real journal, with a clock that
stands still until it is moved and a disk that fails when it is told to.
"""

import errno
import io
import json
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from gwproxy.core.chat import ChatRequest
from gwproxy.core.identity import ApiKey, Organization, Principal, User
from gwproxy.core.learned import Factors, OutputLengths
from gwproxy.core.ledger import State, apply
from gwproxy.core.meter import Meter
from gwproxy.core.pricing import PriceBook
from gwproxy.core.records import AnyRecord, Held, decode
from gwproxy.core.routing import Candidate, Provider
from gwproxy.core.trace import Attempt, Trace
from gwproxy.log import Log
from gwproxy.metrics import Metrics
from gwproxy.state.accounts import Accounts, Terms
from gwproxy.state.books import Books
from gwproxy.state.keyring import Keyring
from gwproxy.state.ledger import Ledger
from gwproxy.state.outage import Outage
from gwproxy.state.rates import Rates
from gwproxy.state.reservation import Planned, Quote, Reservation
from gwproxy.storage.files import OsFiles
from gwproxy.storage.journal import Journal
from gwproxy.storage.scan import scan
from tests.harness import chat, tokenizer

USD = 10**9

NOW_S = 1_795_270_800.0
"""2026-11-21T14:20:00Z."""
MONTH, DAY = "2026-11", "2026-11-21"

PROMPT = 10
"""Tokens of the harness's prompt: 3 words and a dot, its role, and the form of the chat."""

PRICES = {
    "a/cheap": {"input": "1", "output": "2", "max_output_tokens": 8_000},
    "b/dear": {"input": "10", "output": "20", "max_output_tokens": 8_000},
    "c/free": {"input": "0", "output": "0"},
    "d/unknown": {"input": "1", "output": "2"},
    "e/thinker": {"input": "1", "output": "2", "max_output_tokens": 8_000, "reasons": True},
    "f/claude-4-7": {"input": "1", "output": "2", "max_output_tokens": 8_000},
}
"""USD per million tokens: `a/cheap` is 1,000 nano-USD for a token in and 2,000 for one out."""

INPUT, OUTPUT = 1_000, 2_000
"""Nano-USD a token of `a/cheap`."""

_T = TypeVar("_T")


def at_once(coroutine: Coroutine[Any, Any, _T]) -> _T:
    """The result of what has nothing to wait for."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: _T = end.value
        return result
    coroutine.close()
    raise AssertionError("it waits for something")


class Clocks:
    """A wall clock and a monotonic one, in seconds."""

    def __init__(self) -> None:
        self.wall_s = NOW_S
        self.monotonic_s = 1_000.0

    def pass_s(self, seconds: float) -> None:
        self.wall_s += seconds
        self.monotonic_s += seconds

    def wall_ms(self) -> int:
        return int(self.wall_s * 1000)

    def monotonic(self) -> float:
        return self.monotonic_s


class Disk(OsFiles):
    """The real disk, which does not keep a test waiting, and which can be broken."""

    def __init__(self) -> None:
        self.full = False
        self.cannot_cut = False

    def pwrite(self, fd: int, data: bytes, offset: int, /) -> int:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return OsFiles.pwrite(fd, data, offset)

    def ftruncate(self, fd: int, length: int, /) -> None:
        if self.cannot_cut:
            raise OSError(errno.EIO, "Input/output error")
        OsFiles.ftruncate(fd, length)

    def posix_fallocate(self, fd: int, offset: int, length: int, /) -> None:
        OsFiles.ftruncate(fd, offset + length)

    def fsync(self, fd: int, /) -> None: ...

    def fdatasync(self, fd: int, /) -> None: ...

    def fsync_directory(self, directory: Path, /) -> None: ...

    @contextmanager
    def broken(self, *, uncertain: bool = False) -> Iterator[None]:
        """Nothing can be written; `uncertain`: nor can what was half written be taken back."""
        self.full, self.cannot_cut = True, uncertain
        yield
        self.full = self.cannot_cut = False


def open_journal(folder: Path, disk: Disk, segment_bytes: int = 1 << 20) -> Journal:
    return Journal.start(
        disk,
        folder,
        scan(disk, folder, "boot", 0),
        ledger_id="ledger",
        epoch=1,
        boot_id="boot",
        applied_lsn=0,
        segment_bytes=segment_bytes,
    )


def records_of(journal: Journal) -> list[AnyRecord]:
    """All that was written, read back from the files."""
    trail = journal.trail()
    payloads: list[bytes] = []
    cursor = trail.segments[0].start
    while True:
        more, cursor = trail.read(cursor, 10_000, 1 << 20)
        if not more:
            return [decode(payload) for payload in payloads]
        payloads += more


def give_spare(journal: Journal) -> None:
    """What the owner of a journal does in a thread, where there is no spare any more."""
    spare = journal.begin_spare()
    if spare is not None:
        spare.run()
        journal.end_spare(spare, None)


def figures_of(state: State) -> dict[str, Any]:
    """All that a state knows, to be compared."""
    return {
        "lsn": state.lsn,
        "t": state.t,
        "balances": {key: balance.figures() for key, balance in state.balances.items()},
        "holds": {
            lsn: (hold.reserve, hold.holds, hold.hidden, hold.attempt, hold.mark, hold.tokens)
            for lsn, hold in state.holds.items()
        },
        "alerts": set(state.alerts),
        "breakers": dict(state.breakers),
        "idempotency": dict(state.idempotency),
    }


def fold(records: list[AnyRecord]) -> State:
    state = State()
    for record in records:
        apply(state, record)
    return state


def candidate(name: str, *, field: str = "max_tokens") -> Candidate:
    provider, _, model = name.partition("/")
    return Candidate(Provider(provider, "", provider, max_tokens_field=field), model, model, model)


class Office:
    """The books with all that belongs to them, and one caller: alice of acme with her key."""

    def __init__(
        self,
        folder: Path,
        *,
        limit: int | None = None,
        terms: Terms | None = None,
        prices: dict[str, Any] = PRICES,
        segment_bytes: int = 1 << 20,
        durable: Callable[[int], Awaitable[None]] | None = None,
        **organization: Any,
    ) -> None:
        """`limit` is alice's, in nano-USD."""
        self.clocks = Clocks()
        self.disk = Disk()
        folder.mkdir(exist_ok=True)
        self.journal = open_journal(folder, self.disk, segment_bytes)
        self.ledger = Ledger(State(), self.journal, self.clocks.wall_ms)
        self.keyring = Keyring()
        self.organization = Organization(org_id="acme", created_at=1, **organization)
        self.user = User(user_id="alice", org_id="acme", monthly_limit=limit, created_at=1)
        self.key = ApiKey(key_id="key_1", user_id="alice", prefix="p", digest=b"1", created_at=1)
        for row in (self.organization, self.user, self.key):
            self.keyring.apply(row)
        self.principal = self.principal_of(self.key)
        self.accounts = Accounts(self.keyring, terms or Terms())
        self.rates = Rates(self.clocks.monotonic)
        self.lengths = OutputLengths()
        self.factors = Factors()
        self.metrics = Metrics(frozenset("abcdef"), frozenset())
        self.written = io.StringIO()
        self.log = Log(self.written, "debug")
        self.outage = Outage()
        self.waited_for: list[int] = []
        """The records that somebody wanted to be safe before going on."""
        self.books = Books(
            self.ledger,
            self.keyring,
            self.accounts,
            PriceBook({"version": "test", "aliases": {}, "providers": {}}, prices),
            self.rates,
            self.lengths,
            self.factors,
            count=tokenizer().count,
            durable=durable or self.durable,
            outage=self.outage,
            metrics=self.metrics,
            log=self.log,
        )

    async def durable(self, lsn: int) -> None:
        self.waited_for.append(lsn)

    # -- the directory -------------------------------------------------------------------------

    def principal_of(self, key: ApiKey) -> Principal:
        user = self.keyring.user(key.user_id)
        assert user is not None
        return Principal(key.key_id, key.user_id, user.org_id, key.name, key.allowed_models)

    def change_organization(self, **fields: Any) -> None:
        self.organization = replace(self.organization, **fields)
        self.keyring.apply(self.organization)

    def change_user(self, **fields: Any) -> None:
        self.user = replace(self.user, **fields)
        self.keyring.apply(self.user)

    def change_key(self, **fields: Any) -> None:
        self.key = replace(self.key, **fields)
        self.keyring.apply(self.key)

    # -- requests ------------------------------------------------------------------------------

    def quote(self, *names: str, stream: bool = True, **body: Any) -> Quote:
        request = ChatRequest.parse(json.dumps(chat(stream, **body)).encode())
        chain = [candidate(name) for name in names or ("a/cheap",)]
        return at_once(self.books.quote(self.principal, request, chain))

    def reserve(self, *names: str, stream: bool = True, **body: Any) -> Reservation:
        """A request that is admitted, or refused by what is raised."""
        quote = self.quote(*names, stream=stream, **body)
        trace = Trace(f"req_{self.ledger.state.lsn + 1}", 0.0)
        return self.books.reserve(self.principal, quote, trace)

    def spend(self, cost: int) -> None:
        """A request of alice's that cost so much, with `a/cheap`: a whole number of tokens."""
        reservation = self.reserve(stream=False, max_tokens=1)
        tokens, rest = divmod(cost, INPUT)
        assert not rest
        uses(answered(reservation), 0, tokens)
        ends(reservation)

    def teach(self, tokens: int, model: str = "cheap") -> None:
        """So many tokens is what calls of this model usually take."""
        for _ in range(3):
            self.lengths.observe(self.key.key_id, model, tokens)

    # -- what came of it -----------------------------------------------------------------------

    def balance(self, account: str, period: str = MONTH) -> tuple[int, int]:
        """(spent, held)."""
        balance = self.ledger.state.balances[account, period]
        return balance.spent, balance.held

    @property
    def spent(self) -> int:
        return self.balance("user:alice")[0]

    @property
    def held(self) -> int:
        return self.balance("user:alice")[1]

    def records(self) -> list[AnyRecord]:
        return records_of(self.journal)

    def assert_in_order(self) -> None:
        """The state is what its journal says, nothing is owed, and nothing is held any more."""
        state = self.ledger.state
        assert figures_of(state) == figures_of(fold(self.records()))
        assert not self.ledger.owes
        assert not state.holds
        assert all(balance.held == 0 for balance in state.balances.values())


# -- an attempt, as dispatch and relay make it -----------------------------------------------------


def attempt(reservation: Reservation, planned: Planned | None = None) -> Meter:
    """Its bytes have left."""
    planned = planned or reservation.chain[0]
    of = planned.priced.candidate
    reservation.trace.attempts.append(Attempt(of.provider.name, of.model))
    meter = reservation.attempt(planned)
    reservation.sent()
    return meter


def answered(reservation: Reservation, planned: Planned | None = None) -> Meter:
    """And the upstream has accepted them."""
    meter = attempt(reservation, planned)
    reservation.answering()
    return meter


def unanswered(reservation: Reservation, planned: Planned | None = None) -> None:
    attempt(reservation, planned)
    reservation.unanswered()


def text(words: int) -> str:
    """So many words, each a token of its own."""
    return " hello" * words


def says(meter: Meter, words: int) -> None:
    """One event of a stream."""
    meter.observe({"choices": [{"index": 0, "delta": {"content": text(words)}}]})


def uses(meter: Meter, output: int, prompt: int = PROMPT) -> None:
    """The end of an answer, with what the provider has counted."""
    total = prompt + output
    usage = {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": total}
    meter.observe({"choices": [], "usage": usage})


def relays(reservation: Reservation, words: int) -> None:
    """One event arrives and is passed on; what refuses it is raised."""
    meter = reservation.meter
    assert meter is not None
    says(meter, words)
    if meter.bound() > reservation.mark:
        reservation.extend()


def ends(reservation: Reservation) -> None:
    """Its `with` is left."""
    at_once(reservation.__aexit__(None, None, None))


def amounts(holds: tuple[Held, ...]) -> dict[str, int]:
    return {each.account: each.hold for each in holds}
