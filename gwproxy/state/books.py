"""The books: what a request may cost, whether its budgets allow it, and what came of it.

No `await` between check, hold and record: `reserve` is one step. What a reservation does from then
on, to its one settlement, is in `state.reservation`.
"""

import asyncio
import contextlib
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from gwproxy.core.errors import ModelNotPriced, StorageUnavailable
from gwproxy.core.holds import Ask, Short, plan
from gwproxy.core.identity import Organization, Principal
from gwproxy.core.learned import Factors, OutputLengths
from gwproxy.core.ledger import Account, held, left
from gwproxy.core.money import NANOS_PER_USD
from gwproxy.core.period import periods
from gwproxy.core.pricing import PriceBook
from gwproxy.core.records import Alert, Reserve
from gwproxy.core.request import ModelRequest
from gwproxy.core.routing import Candidate
from gwproxy.core.trace import Trace
from gwproxy.log import Log
from gwproxy.metrics import Metrics
from gwproxy.state.accounts import Accounts
from gwproxy.state.keyring import Keyring
from gwproxy.state.ledger import RETRY_AFTER_S, Ledger, RecordUncertain
from gwproxy.state.outage import Outage
from gwproxy.state.providers import OVER_BUDGET, Skip, unavailable
from gwproxy.state.rates import Rates
from gwproxy.state.reservation import Desk, Planned, Priced, Quote, Reservation, Spent

ALERT_PERCENT: Final = (80, 95, 100)

NEGLIGIBLE: Final = 100
"""A prompt is counted only where its bound is more than a hundredth of what is left."""

MAXIMUM_BYTES: Final = 40
"""The field that a refusal may offer to be sent the next time: its bytes count already."""


class Books:
    """Quotes and reservations. `count` is the tokenizer's; `outage` says whether there is one."""

    def __init__(
        self,
        ledger: Ledger,
        keyring: Keyring,
        accounts: Accounts,
        prices: PriceBook,
        rates: Rates,
        lengths: OutputLengths,
        factors: Factors,
        *,
        count: Callable[[str], int],
        durable: Callable[[int], Awaitable[None]],
        outage: Outage,
        metrics: Metrics,
        log: Log,
    ) -> None:
        self.ledger = ledger
        self.accounts = accounts
        self._keyring = keyring
        self._prices = prices
        self._books_of: dict[str, tuple[Organization, PriceBook]] = {}
        self._rates = rates
        self._lengths = lengths
        self._factors = factors
        self._count = count
        self._outage = outage
        self._metrics = metrics
        self._log = log
        self.alerted: Callable[[Alert], None] = _nobody
        """Told of each alert that was recorded."""
        self._desk = Desk(ledger, keyring, accounts, count, durable, self._settled)

    def reprice(self, prices: PriceBook) -> None:
        """These prices hold for quotes from here on."""
        self._prices = prices
        self._books_of.clear()

    # -- quote -------------------------------------------------------------------------------

    async def quote(
        self, principal: Principal, request: ModelRequest, chain: Sequence[Candidate]
    ) -> Quote:
        """The candidates that can be priced; ModelNotPriced when there is none.

        Awaits only where a long prompt has to be counted.
        """
        now_ms = self.ledger.now_ms()
        month_and_day = periods(now_ms)
        payer = self.accounts.payer(principal, month_and_day, degraded=self._outage.lost)
        prices = self._prices_of(payer.organization)
        rated = []
        for candidate in chain:
            rate = prices.rate_of(candidate, now_ms / 1000)
            if rate is not None:
                rated.append((candidate, rate))
        if not rated:
            raise ModelNotPriced(
                "This model has no price here, so it cannot be kept within a budget. "
                "The operator can set one under [prices.models].",
                param="model",
            )
        bound, counted = request.prompt_bound(), None
        if request.max_output_tokens is None:
            bound += MAXIMUM_BYTES
        state = self.ledger.state
        room = left(state, payer.limited)
        dearest = 0
        for candidate, rate in rated:
            dearest = max(dearest, rate.worst_case(bound, 0))
            account = self.accounts.provider(candidate.provider.name, month_and_day[1])
            if account.limit is not None:
                room = left(state, (account,), room)
        if room is not None and dearest * NEGLIGIBLE > room:
            counted = await self._counted(request)
        priced = []
        declared = request.max_output_tokens
        for candidate, rate in rated:
            model = candidate.model
            prompt_factor = self._factors.prompts.per_mille(model)
            ask = Ask(
                prompt=bound if counted is None else request.held_prompt(counted, prompt_factor),
                declared=declared,
                choices=request.choices,
                stream=request.stream,
                hidden=rate.hides_reasoning or request.thinks,
                learned=self._lengths.p95(principal.key_id, model) if declared is None else None,
            )
            answer_factor = self._factors.answers.per_mille(model)
            priced.append(Priced(candidate, rate, ask, answer_factor, prompt_factor))
        return Quote(request, tuple(priced), prices.version, counted)

    def has_price(self, principal: Principal, candidate: Candidate) -> bool:
        """Whether a call of this candidate can be priced now."""
        prices = self._prices_of(self._keyring.organization_of(principal))
        return prices.rate_of(candidate, self.ledger.now_ms() / 1000) is not None

    async def _counted(self, request: ModelRequest) -> int:
        """The prompt's tokens, in slices that let the loop breathe."""
        slices = request.prompt_slices(self._count)
        while True:
            try:
                next(slices)
            except StopIteration as end:
                return int(end.value)
            await asyncio.sleep(0)

    def _prices_of(self, organization: Organization) -> PriceBook:
        if not organization.prices:
            return self._prices
        known = self._books_of.get(organization.org_id)
        if known is None or known[0].prices is not organization.prices:
            known = (organization, self._prices.with_overrides(organization.prices))
            self._books_of[organization.org_id] = known
        return known[1]

    # -- reserve -----------------------------------------------------------------------------

    def reserve(self, principal: Principal, quote: Quote, trace: Trace) -> Reservation:
        """Check, hold and record, in one step. Use the reservation as `async with`.

        RateLimited, InsufficientQuota or StorageUnavailable, and then nothing was held.
        """
        ledger, state = self.ledger, self.ledger.state
        degraded = self._outage.lost
        if degraded:
            self._assert_open(self._keyring.organization_of(principal))
            trace.degraded = True
        ledger.admit()
        now_ms = ledger.now_ms()  # one look at the clock for all of it
        month_and_day = periods(now_ms)
        payer = self.accounts.payer(principal, month_and_day, degraded=degraded)
        own = payer.accounts
        room = left(state, payer.limited)

        chain: list[Planned] = []
        amount = 0
        edits = trace.skipped + quote.request.edits
        refused: tuple[tuple[Account, ...], Short] | None = None
        for priced in quote.priced:
            provider = priced.candidate.provider.name
            accounts, theirs = own, room
            if not chain:
                # Its own budget is looked at when its turn comes; the first one's turn is now.
                firsts = (self.accounts.provider(provider, month_and_day[1]),)
                theirs = left(state, firsts, room)
                if theirs != room:
                    accounts = firsts
            found = plan(
                priced.ask,
                priced.rate,
                payer.organization.unbounded_policy,
                theirs,
                self.accounts.terms.default_max_output_tokens,
            )
            if isinstance(found, Short):
                # A provider's budget is the reason only where it is that of every candidate.
                if refused is None or (accounts is own and refused[0] is not own):
                    refused = (accounts, found)
                edits += (str(Skip(provider, OVER_BUDGET)),)
                self._metrics.skipped(provider, OVER_BUDGET).value += 1
            else:
                chain.append(Planned(priced, found))
                amount = max(amount, found.cost)

        tokens = self._tokens(quote, chain) if payer.limits else 0
        rates = self._rates.admit(payer.limits, tokens)
        if not chain:
            rates.undo()
            assert refused is not None, "a quote has a candidate at least"
            accounts, short = refused
            if accounts is not own and trace.wait_s < math.inf:
                # Nor is it the reason where others of the chain may be back in a minute.
                raise unavailable(trace.wait_s)
            refusal = self.accounts.refuse(state, accounts, short.needed, short.fits, now_ms)
            self._metrics.quota_refusal(refusal.scope).value += 1
            raise refusal

        first = chain[0]
        candidate, lowered = first.priced.candidate, first.plan.lowered
        if lowered is not None:
            edits += (f"{quote.request.maximum_field(candidate)}={lowered}",)
        record = Reserve(
            lsn=state.lsn + 1,
            t=now_ms,
            synced=ledger.journal.synced,
            id=trace.request_id,
            model=quote.request.model,
            provider=candidate.provider.name,
            upstream_model=candidate.model,
            prices=quote.price_version,
            holds=held(state, own, amount) + held(state, firsts, first.plan.cost),
            prompt=first.priced.ask.prompt,
            max=first.plan.output,
            stream=quote.request.stream,
            hidden=first.priced.ask.hidden,
            degraded=degraded,
            edits=edits,
        )
        try:
            ledger.post(record)
        except RecordUncertain:
            rates.undo()
            ledger.void(record.lsn)
            raise
        except StorageUnavailable:
            rates.undo()
            raise
        if degraded:
            self._outage.served += 1
        return Reservation(
            self._desk,
            principal,
            quote,
            chain,
            first.plan,
            rates,
            month_and_day,
            record.lsn,
            trace,
            degraded,
        )

    def _assert_open(self, organization: Organization) -> None:
        """The database is lost: is this organization served all the same? StorageUnavailable."""
        if not self.accounts.terms.serves_open(organization):
            self._outage.refused += 1
            raise StorageUnavailable(
                "The gateway's database is not available at the moment.",
                retry_after_s=RETRY_AFTER_S,
            )

    @staticmethod
    def _tokens(quote: Quote, chain: Sequence[Planned]) -> int:
        """What a limit on tokens a minute is asked for."""
        if chain:
            return chain[0].priced.ask.prompt + chain[0].plan.output
        ask = quote.priced[0].ask
        return ask.prompt + (ask.declared or 0) * ask.choices

    # -- settle ------------------------------------------------------------------------------

    def _settled(self, reservation: Reservation, spent: Sequence[Spent], overrun: int) -> None:
        """What a settlement means to everybody but the ledger."""
        metrics, trace = self._metrics, reservation.trace
        for each in spent:
            candidate = each.priced.candidate
            metrics.settled(
                candidate.provider.name,
                candidate.model,
                each.source,
                each.tokens,
                each.cost / NANOS_PER_USD,
            )
            if each.source == "provider" and each.usage.output and trace.outcome == "completed":
                self._learn(reservation, each)
        metrics.settlement(trace.outcome).value += 1
        if overrun:
            metrics.overruns.value += 1
        if spent:
            if self.ledger.owes:  # this settlement too
                self.ledger.must(lambda: self._alert(reservation))
            else:
                self._alert(reservation)

    def _learn(self, reservation: Reservation, spent: Spent) -> None:
        """From an answer that came to its own end: one that was cut says nothing of its like."""
        usage, model = spent.usage, spent.priced.candidate.model
        self._lengths.observe(reservation.principal.key_id, model, usage.output)
        meter, quote = reservation.meter, reservation.quote
        if meter is not None and meter.has_output:
            shown = usage.output - usage.reasoning
            self._factors.answers.observe(model, meter.counted(), shown)
        if quote.counted is not None and quote.request.text_alone:
            self._factors.prompts.observe(model, quote.counted, usage.input_total)

    def _alert(self, reservation: Reservation) -> None:
        """Say, once per account and period, that most of a budget is spent."""
        ledger = self.ledger
        state = ledger.state
        for account in self.accounts.payer(reservation.principal, reservation.periods).limited:
            assert account.limit is not None
            balance = state.balances[account.name, account.period]
            limit = account.limit + balance.credited
            if not balance.spent or balance.spent * 100 < limit * ALERT_PERCENT[0]:
                continue  # where nothing may be spent, what is free is no reason for an alert
            for percent in ALERT_PERCENT:
                crossed = (account.name, account.period, percent)
                if balance.spent * 100 < limit * percent or crossed in state.alerts:
                    continue
                self._raise_alert(*crossed, balance.spent, limit)

    def _raise_alert(self, name: str, period: str, percent: int, spent: int, limit: int) -> None:
        ledger = self.ledger

        def record() -> None:
            if (name, period, percent) not in ledger.state.alerts:
                alert = Alert(
                    **ledger.stamp(),
                    account=name,
                    period=period,
                    percent=percent,
                    spent=spent,
                    limit=limit,
                )
                with contextlib.suppress(RecordUncertain):  # it counts
                    ledger.post(alert)
                self.alerted(alert)
                self._log.event(
                    "warning",
                    "budget alert",
                    account=name,
                    period=period,
                    percent=percent,
                    spent_nanos=spent,
                    limit_nanos=limit,
                )
                self._metrics.budget_alert(name.partition(":")[0], percent).value += 1

        ledger.must(record)


def _nobody(alert: Alert) -> None:
    """Nobody wants to be told."""
