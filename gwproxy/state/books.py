"""The books: what a request may cost, what it has cost, and that it is settled exactly once.

Memory only, and no `await` between a decision and its effect. A reservation is an `async with`
whose exit settles, so that no way out of a request can forget to.
"""

import asyncio
import enum
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

import msgspec

from gwproxy.core.chat import ChatRequest
from gwproxy.core.errors import ModelNotPriced
from gwproxy.core.estimate import prompt_tokens
from gwproxy.core.identity import Principal
from gwproxy.core.meter import Meter
from gwproxy.core.money import NANOS_PER_USD, Nanos
from gwproxy.core.pricing import PriceBook, Rate
from gwproxy.core.routing import Candidate
from gwproxy.core.tokens import family_factor, scale
from gwproxy.core.trace import Trace
from gwproxy.core.usage import Usage
from gwproxy.metrics import Metrics

EXACT_PROMPT_BYTES = 256 * 1024
"""A prompt that must be counted after the fact is counted exactly up to this size (about 15 ms);
a larger one by its bytes, so that one settlement cannot hold up every other stream."""


_Tokens = tuple[int, int, int, int, int]


class Outcome(enum.StrEnum):
    COMPLETED = "completed"
    FAILED = "failed"  # no provider answered
    CLIENT_LEFT = "client_left"
    TRUNCATED = "truncated"  # the upstream ended in the middle
    UNKNOWN = "unknown"  # sent, and nothing came back


class _Stage(enum.Enum):
    """How far the attempt under way has come: it decides who pays for what."""

    NOT_SENT = enum.auto()
    SENT = enum.auto()
    ANSWERING = enum.auto()


class Priced(msgspec.Struct, frozen=True):
    """A candidate with the rate of the moment of its quote."""

    candidate: Candidate
    rate: Rate


class Quote(msgspec.Struct, frozen=True):
    """The candidates of one request that have a price, in the order to be tried."""

    chat: ChatRequest
    priced: tuple[Priced, ...]
    price_version: str


class Spent(msgspec.Struct, frozen=True):
    """What one attempt has consumed, and who says so."""

    priced: Priced
    usage: Usage
    source: str

    @property
    def cost(self) -> Nanos:
        return self.priced.rate.cost(self.usage)


class Reservation:
    """One admitted request. Leaving its `with` settles whatever was metered, once."""

    __slots__ = (
        "_books",
        "_priced",
        "_settled",
        "_spent",
        "_stage",
        "meter",
        "outcome",
        "quote",
        "trace",
    )

    def __init__(self, books: "Books", quote: Quote, trace: Trace) -> None:
        self._books = books
        self._priced: Priced | None = None
        self._stage = _Stage.NOT_SENT
        self._settled = False
        self._spent: list[Spent] = []  # by attempts that were sent and never answered
        self.quote = quote
        self.trace = trace
        self.meter: Meter | None = None
        self.outcome: Outcome | None = None

    async def __aenter__(self) -> Self:
        self._books.metrics.holds_open.value += 1
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.outcome is None and isinstance(error, asyncio.CancelledError | ConnectionError):
            # Cancelled by the server, or found out by us on writing to a closed connection.
            self.outcome = Outcome.CLIENT_LEFT
        self.settle()

    # -- told by dispatch and relay ----------------------------------------------------------

    def attempt(self, priced: Priced) -> Meter:
        """A new attempt begins, with a meter of its own."""
        self._priced = priced
        self._stage = _Stage.NOT_SENT
        meter = self.meter = Meter(self._books.count)
        return meter

    def sent(self) -> None:
        """The attempt's bytes are leaving: from here on the upstream may bill."""
        self._stage = _Stage.SENT

    def answering(self) -> None:
        """The upstream accepted the request: what it answers is paid for."""
        self._stage = _Stage.ANSWERING

    def refused(self) -> None:
        """The upstream answered with an error status: it bills nothing."""
        self._stage = _Stage.NOT_SENT

    def unanswered(self) -> None:
        """The attempt ended without an answer: its prompt may have been billed."""
        assert self._priced is not None
        self._spent.append(Spent(self._priced, Usage(input=self._prompt_tokens()), "estimated"))
        self._stage = _Stage.NOT_SENT

    # -- the end -----------------------------------------------------------------------------

    def settle(self) -> None:
        """Fix what the request cost. A second call changes nothing."""
        if self._settled:
            return
        self._settled = True
        trace, metrics, spent = self.trace, self._books.metrics, self._spent
        outcome = self.outcome
        if outcome is None:
            if self._stage is _Stage.ANSWERING:
                outcome = Outcome.COMPLETED
            else:
                outcome = Outcome.UNKNOWN if spent else Outcome.FAILED
        if self._stage is not _Stage.NOT_SENT:
            spent.append(self._measure())
        cost, tokens = 0, _NO_TOKENS
        for each in spent:
            usage, candidate, nanos = each.usage, each.priced.candidate, each.cost
            consumed = (
                usage.input,
                usage.cache_read,
                usage.cache_write,
                usage.output,
                usage.reasoning,
            )
            trace.source = each.source
            cost += nanos
            # One attempt is all that nearly every request has.
            tokens = consumed if tokens is _NO_TOKENS else _added(tokens, consumed)
            metrics.settled(
                candidate.provider.name,
                candidate.model,
                each.source,
                consumed,
                nanos / NANOS_PER_USD,
            )
        trace.outcome = outcome
        trace.cost_nanos = cost
        trace.price_version = self.quote.price_version
        trace.tokens = tokens
        metrics.holds_open.value -= 1
        metrics.settlement(outcome).value += 1

    def _measure(self) -> Spent:
        """What the attempt under way has consumed."""
        meter, priced = self.meter, self._priced
        assert meter is not None and priced is not None, "an attempt that was sent has both"
        reported = meter.usage
        if reported is not None and self.outcome in (None, Outcome.COMPLETED):
            return Spent(priced, reported, "provider")
        if self._stage is _Stage.SENT:
            return Spent(priced, Usage(input=self._prompt_tokens()), "estimated")
        counted = scale(meter.counted(), family_factor(priced.candidate.model))
        if reported is None:
            counted_usage = Usage(input=self._prompt_tokens(), output=counted)
            return Spent(priced, counted_usage, "counted")
        if counted <= reported.output:
            return Spent(priced, reported, "provider")
        # The stream went on after the last running total that the provider gave.
        longer = Usage(
            input=reported.input,
            cache_read=reported.cache_read,
            cache_write=reported.cache_write,
            output=counted,
            reasoning=reported.reasoning,
        )
        return Spent(priced, longer, "counted")

    def _prompt_tokens(self) -> int:
        assert self._priced is not None
        chat = self.quote.chat
        if chat.size_bytes > EXACT_PROMPT_BYTES:
            tokens = (chat.size_bytes + 3) // 4
        else:
            tokens = prompt_tokens(chat.body, self._books.count)
        return scale(tokens, family_factor(self._priced.candidate.model))


_NO_TOKENS = (0, 0, 0, 0, 0)


def _added(one: _Tokens, other: _Tokens) -> _Tokens:
    a, b, c, d, e = (x + y for x, y in zip(one, other, strict=True))
    return a, b, c, d, e


class Books:
    """Quotes and reservations. `count` is the tokenizer's, `clock` gives seconds since 1970."""

    def __init__(
        self,
        prices: PriceBook,
        metrics: Metrics,
        *,
        count: Callable[[str], int],
        clock: Callable[[], float],
    ) -> None:
        self._prices = prices
        self.metrics = metrics
        self.count = count
        self._clock = clock

    def quote(self, chat: ChatRequest, chain: Sequence[Candidate]) -> Quote:
        """The candidates that can be priced; ModelNotPriced when there is none."""
        now = self._clock()
        priced = []
        for candidate in chain:
            rate = self._prices.rate_of(candidate, now)
            if rate is not None:
                priced.append(Priced(candidate, rate))
        if not priced:
            raise ModelNotPriced(
                "This model has no price here, so it cannot be kept within a budget. "
                "The operator can set one under [prices.models].",
                param="model",
            )
        return Quote(chat, tuple(priced), self._prices.version)

    def reserve(self, principal: Principal, quote: Quote, trace: Trace) -> Reservation:
        """Admit the request. Use as `async with`."""
        return Reservation(self, quote, trace)
