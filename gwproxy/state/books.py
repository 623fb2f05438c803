"""The books: what a request may cost, what it has cost, and that it is settled exactly once.

Memory only, and no `await` between a decision and its effect. A reservation is an `async with`
whose exit settles, so that no way out of a request can forget to.
"""

import asyncio
import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

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


@dataclass(frozen=True, slots=True)
class Priced:
    """A candidate with the rate of the moment of its quote."""

    candidate: Candidate
    rate: Rate


@dataclass(frozen=True, slots=True)
class Quote:
    """The candidates of one request that have a price, in the order to be tried."""

    chat: ChatRequest
    priced: tuple[Priced, ...]
    price_version: str


class Reservation:
    """One admitted request. Leaving its `with` settles whatever was metered, once."""

    __slots__ = (
        "_books",
        "_earlier",
        "_priced",
        "_settled",
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
        self._earlier = 0  # nano-USD of attempts that were sent and never answered
        self._settled = False
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
        if isinstance(error, asyncio.CancelledError):
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
        self._earlier += self._priced.rate.cost(Usage(input=self._prompt_tokens()))
        self._stage = _Stage.NOT_SENT
        self.outcome = Outcome.UNKNOWN

    # -- the end -----------------------------------------------------------------------------

    def settle(self) -> None:
        """Fix what the request cost. A second call changes nothing."""
        if self._settled:
            return
        self._settled = True
        trace, priced = self.trace, self._priced
        usage, source = Usage(), "estimated"
        cost = Nanos(self._earlier)
        if priced is not None and self._stage is not _Stage.NOT_SENT:
            usage, source = self._measure()
            cost = Nanos(cost + priced.rate.cost(usage))
        outcome = self.outcome
        if outcome is None:
            answered = self._stage is _Stage.ANSWERING
            outcome = Outcome.COMPLETED if answered else Outcome.FAILED
        trace.outcome = outcome
        trace.source = source if cost or usage.input or usage.output else ""
        trace.cost_nanos = cost
        trace.price_version = self.quote.price_version
        trace.tokens = (
            usage.input,
            usage.cache_read,
            usage.cache_write,
            usage.output,
            usage.reasoning,
        )
        metrics = self._books.metrics
        metrics.holds_open.value -= 1
        metrics.settlement(outcome).value += 1
        if trace.source and priced is not None:
            candidate = priced.candidate
            metrics.settled(
                candidate.provider.name, candidate.model, source, trace.tokens, cost / NANOS_PER_USD
            )

    def _measure(self) -> tuple[Usage, str]:
        """The tokens of the attempt under way, and who says so."""
        meter = self.meter
        assert meter is not None, "an attempt that was sent has a meter"
        reported = meter.usage
        if reported is not None and self.outcome in (None, Outcome.COMPLETED):
            return reported, "provider"
        assert self._priced is not None
        if self._stage is _Stage.SENT:
            return Usage(input=self._prompt_tokens()), "estimated"
        counted = scale(meter.counted(), family_factor(self._priced.candidate.model))
        if reported is None:
            return Usage(input=self._prompt_tokens(), output=counted), "counted"
        if counted <= reported.output:
            return reported, "provider"
        # The stream went on after the last running total that the provider gave.
        return (
            Usage(
                input=reported.input,
                cache_read=reported.cache_read,
                cache_write=reported.cache_write,
                output=counted,
                reasoning=reported.reasoning,
            ),
            "counted",
        )

    def _prompt_tokens(self) -> int:
        assert self._priced is not None
        chat = self.quote.chat
        if chat.size_bytes > EXACT_PROMPT_BYTES:
            tokens = (chat.size_bytes + 3) // 4
        else:
            tokens = prompt_tokens(chat.body, self._books.count)
        return scale(tokens, family_factor(self._priced.candidate.model))


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
            rate = self._prices.rate("", candidate.sent, now) if candidate.verbatim else None
            if rate is None:
                rate = self._prices.rate(candidate.provider.prices, candidate.model, now)
            # A fee per call stands outside the rate: what it costs could not be kept exact.
            if rate is not None and (rate.overridden or "requests_kcount" not in rate.extras):
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
