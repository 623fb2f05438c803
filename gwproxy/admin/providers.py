"""Providers: how each one stands, and an operator's word on whether it is asked."""

from collections.abc import Mapping
from typing import Annotated

import msgspec

from gwproxy.admin import body as checked
from gwproxy.admin.ask import Answer, Ask, Route
from gwproxy.admin.usage import Gateway
from gwproxy.core.breaker import State
from gwproxy.core.money import format_usd
from gwproxy.core.period import DAY_MS, rfc3339
from gwproxy.state import providers as standings
from gwproxy.state.accounts import Accounts, figures
from gwproxy.state.gateway_side import GatewaySide
from gwproxy.state.ledger import Ledger
from gwproxy.storage.gateway_sums import Sum

Rate = Annotated[
    float | None,
    msgspec.Meta(description="of the last 64 attempts that were answered or failed; null: none"),
]


class Provider(msgspec.Struct):
    provider: str
    state: State
    enabled: bool
    consecutive_failures: int
    retry_at: Annotated[
        str | None, msgspec.Meta(description="when one that is open is tried again")
    ]
    success_rate: Rate
    failure_rate: Rate
    latency_ms: Annotated[
        float | None,
        msgspec.Meta(description="running mean until an answer counts; null: there was none"),
    ]
    attempts: Annotated[
        dict[str, int], msgspec.Meta(description="since the start, by what they ended with")
    ]
    rpm: int | None
    requests_last_minute: Annotated[
        int | None, msgspec.Meta(description="null: not counted, since nothing limits them")
    ]
    daily_limit_usd: str | None
    day_usage_usd: str
    day_held_usd: str
    resets_at: str
    gateway: Annotated[
        Gateway | None,
        msgspec.Meta(description="of today, by the gateway's log; null: not reconciled yet"),
    ] = None


class ProviderPage(msgspec.Struct):
    data: list[Provider]
    next_cursor: str | None


class ProviderQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    limit: checked.PerPage = checked.PER_PAGE
    cursor: Annotated[str, msgspec.Meta(description="`next_cursor` of the page before")] = ""


class Providers:
    def __init__(
        self,
        providers: standings.Providers,
        accounts: Accounts,
        ledger: Ledger,
        gateway_side: GatewaySide,
    ) -> None:
        self._providers = providers
        self._accounts = accounts
        self._ledger = ledger
        self._gateway_side = gateway_side

    def routes(self) -> list[Route]:
        one = "/admin/providers/{provider}"
        actions = (
            ("reset", self.reset, "Close a provider's breaker and forget its failures."),
            ("enable", self.enable, "Ask a provider again that was disabled."),
            ("disable", self.disable, "Leave a provider alone until it is enabled."),
        )
        return [
            Route(
                method="GET",
                path="/admin/providers",
                do=self.list,
                summary="List the providers: breakers, rates, limits.",
                query=ProviderQuery,
                answers=ProviderPage,
            ),
            Route(
                method="GET",
                path=one,
                do=self.show,
                summary="Show how a provider stands.",
                answers=Provider,
            ),
            *(
                Route(
                    method="POST",
                    path=f"{one}/{name}",
                    do=do,
                    summary=summary,
                    answers=Provider,
                )
                for name, do, summary in actions
            ),
        ]

    async def list(self, ask: Ask, query: ProviderQuery) -> Answer:
        rest = [each for each in self._providers.all() if each.name > query.cursor]
        page = rest[: query.limit]
        more = page[-1].name if len(rest) > len(page) else None
        seen = await self._today()
        return Answer(ProviderPage([self._shown(each, seen) for each in page], more))

    async def show(self, ask: Ask, provider: str) -> Answer:
        return await self._answer(self._providers.named(provider))

    async def reset(self, ask: Ask, provider: str) -> Answer:
        return await self._answer(await self._providers.reset(provider, ask.by))

    async def enable(self, ask: Ask, provider: str) -> Answer:
        return await self._answer(await self._providers.enable(provider, ask.by))

    async def disable(self, ask: Ask, provider: str) -> Answer:
        return await self._answer(await self._providers.disable(provider, ask.by))

    async def _answer(self, standing: standings.Standing) -> Answer:
        return Answer(self._shown(standing, await self._today()))

    async def _today(self) -> Mapping[str, Sum]:
        day = self._ledger.now_ms() // DAY_MS
        return await self._gateway_side.by_provider(day, day)

    def _shown(self, standing: standings.Standing, seen: Mapping[str, Sum]) -> Provider:
        providers, ledger, breaker = self._providers, self._ledger, standing.breaker
        retry_at = None
        if breaker.state is State.OPEN:
            wait_s = breaker.wait_s(providers.now()) or 0.0
            retry_at = rfc3339(ledger.now_ms() + int(wait_s * 1000))
        failed = standing.failure_rate
        account = self._accounts.provider(standing.name, ledger.periods()[1])
        day = figures(ledger.state, account)
        return Provider(
            provider=standing.name,
            state=breaker.state,
            enabled=breaker.state is not State.DISABLED,
            consecutive_failures=breaker.failures,
            retry_at=retry_at,
            success_rate=None if failed is None else round(1 - failed, 4),
            failure_rate=None if failed is None else round(failed, 4),
            latency_ms=round(standing.latency_s * 1000, 1) if standing.latency_s else None,
            attempts=providers.attempts(standing.name),
            rpm=standing.rpm,
            requests_last_minute=providers.used(standing),
            daily_limit_usd=None if day.limit is None else format_usd(day.limit),
            day_usage_usd=format_usd(day.spent),
            day_held_usd=format_usd(day.held),
            resets_at=day.resets_at,
            gateway=None if standing.name not in seen else Gateway.of(seen[standing.name]),
        )
