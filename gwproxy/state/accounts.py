"""Accounts: which ones a request is charged to, their limits as they are now, and in words and
figures what is left on them. Reads the keyring and the ledger's state, changes neither.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Final

import msgspec

from gwproxy.core.errors import InsufficientQuota
from gwproxy.core.identity import (
    FailureMode,
    OnExhausted,
    Organization,
    Principal,
    Status,
    UnboundedPolicy,
)
from gwproxy.core.ledger import Account, Balance, State
from gwproxy.core.limits import Limit, limits_of
from gwproxy.core.money import format_usd, format_usd_short
from gwproxy.core.period import end_ms, rfc3339
from gwproxy.state.keyring import Keyring


@dataclass(frozen=True, slots=True)
class Terms:
    """What the operator's configuration says about money, in nano-USD."""

    default_max_output_tokens: int = 4096
    provider_daily: Mapping[str, int] = field(default_factory=dict)
    """Limits a day by provider; one that is not there has none."""
    failure_mode: FailureMode = FailureMode.CLOSED
    outage_daily: int = 0
    """Per organization and day while the database is lost, where the organization says nothing."""

    def serves_open(self, organization: Organization) -> bool:
        """Whether it is served while the database is lost."""
        return (organization.failure_mode or self.failure_mode) is FailureMode.OPEN

    def outage_limit(self, organization: Organization) -> int:
        """What it may spend on such a day. There is always a limit."""
        limit = organization.fallback_daily_limit
        return self.outage_daily if limit is None else limit

    def worst_case(self, organizations: Iterable[Organization]) -> tuple[int, int]:
        """Of these, how many are served in an outage, and what a day of it can cost at most."""
        limits = [
            self.outage_limit(each)
            for each in organizations
            if self.serves_open(each) and each.status is Status.ACTIVE and each.deleted_at is None
        ]
        return len(limits), sum(limits)


class Figures(msgspec.Struct, frozen=True, gc=False):
    """How an account stands, in nano-USD; `remaining` is never below 0, None without a limit."""

    scope: str
    id: str
    period: str
    spent: int
    held: int
    limit: int | None
    remaining: int | None
    count: int

    @property
    def resets_at(self) -> str:
        return _reset(self.period)

    def json(self) -> dict[str, object]:
        """As the usage routes show it."""
        return {
            "scope": self.scope,
            "id": self.id,
            "month_usage_usd": format_usd(self.spent),
            "held_usd": format_usd(self.held),
            "limit_usd": None if self.limit is None else format_usd(self.limit),
            "remaining_usd": None if self.remaining is None else format_usd(self.remaining),
            "current_month": self.period[:7],
            "request_count": self.count,
            "resets_at": self.resets_at,
        }


_UNUSED = Balance()

REMEMBERED: Final = 10_000
"""Callers kept ready, a few hundred bytes each; past this many they are made anew."""


class Payer(msgspec.Struct, frozen=True, gc=False):
    """Whose money a request is: what follows from the directory's rows, as they are in one version
    of it, and from the month."""

    principal: Principal
    version: int
    month: str
    organization: Organization
    """In an outage without the policies that would pass its bound."""
    limits: tuple[Limit, ...]
    """Of requests, tokens and open calls."""
    accounts: tuple[Account, ...]
    """Of the key, the user and the organization, and in an outage one more."""
    limited: tuple[Account, ...]
    """Those that have a limit: of the others nobody asks how much is left."""


class Accounts:
    def __init__(self, keyring: Keyring, terms: Terms) -> None:
        self._keyring = keyring
        self.terms = terms
        self._payers: dict[str, Payer] = {}
        # By name: the providers are those of the configuration and the catalogue, never many.
        self._providers: dict[str, Account] = {}

    def payer(
        self, principal: Principal, periods: tuple[str, str], *, degraded: bool = False
    ) -> Payer:
        """Who pays for a request of this caller, as the directory says now."""
        payer = self._payers.get(principal.key_id)
        if (
            payer is None
            or payer.principal is not principal
            or payer.version != self._keyring.version
            or payer.month != periods[0]
        ):
            payer = self._payer(principal, periods[0])
        return self._in_outage(payer, periods[1]) if degraded else payer

    def _payer(self, principal: Principal, month: str) -> Payer:
        key, user = self._keyring.limited(principal)
        organization = self._keyring.organization_of(principal)
        key_name, user_name, org_name = principal.accounts
        accounts = (
            Account(key_name, month, key.monthly_limit),
            Account(user_name, month, user.monthly_limit),
            Account(org_name, month, organization.monthly_budget),
        )
        if len(self._payers) >= REMEMBERED:
            self._payers.clear()
        payer = self._payers[principal.key_id] = Payer(
            principal,
            self._keyring.version,
            month,
            organization,
            limits_of(key, user),
            accounts,
            tuple([each for each in accounts if each.limit is not None]),
        )
        return payer

    def _in_outage(self, payer: Payer, day: str) -> Payer:
        organization = payer.organization
        limit = self.terms.outage_limit(organization)
        account = Account(f"outage:{organization.org_id}", day, limit)
        return msgspec.structs.replace(
            payer,
            organization=_bounded(organization),
            accounts=(*payer.accounts, account),
            limited=(*payer.limited, account),
        )

    def exposure(self, state: State, day: str) -> int:
        """Spent and held on that day while the database was lost, by all organizations."""
        found = [
            state.balances.get((f"outage:{each.org_id}", day), _UNUSED)
            for each in self._keyring.organizations_after("")
        ]
        return sum(balance.spent + balance.held for balance in found)

    def provider(self, name: str, day: str) -> Account:
        limit = self.terms.provider_daily.get(name)
        known = self._providers.get(name)
        if known is None or known.period != day or known.limit != limit:
            known = self._providers[name] = Account(f"provider:{name}", day, limit)
        return known

    def refuse(
        self, state: State, accounts: tuple[Account, ...], needed: int, fits: int, now_ms: int
    ) -> InsufficientQuota:
        """The refusal of `needed` nano-USD more, in the name of the account with the least left."""
        found = tightest(state, accounts)
        assert found.limit is not None and found.remaining is not None, "no limit, no refusal"
        scope = found.scope
        resets_at = end_ms(found.period)
        whose = _WHOSE[scope]
        if fits:
            message = (
                f"{whose} has {format_usd_short(found.remaining)} USD left of "
                f"{format_usd_short(found.limit)}, and this request may cost more than that. "
                f"A maximum of {fits} output tokens would fit."
            )
        else:
            state_of_it = "has no room for this" if found.remaining else "is used up"
            message = (
                f"{whose} {state_of_it}: {format_usd_short(found.spent)} USD spent and "
                f"{format_usd_short(found.held)} USD held of {format_usd_short(found.limit)}."
            )
        anew = f"It starts anew at {rfc3339(resets_at)}."
        if scope == "outage":
            anew = (
                "As soon as the database is back, the usual budgets hold again, and this one does "
                f"not count; otherwise it starts anew at {rfc3339(resets_at)}."
            )
        return InsufficientQuota(
            f"{message} {anew}",
            scope=scope,
            code="request_exceeds_remaining" if fits else None,
            retry_after_s=max(1, -(-(resets_at - now_ms) // 1000)),
            headers={"x-should-retry": "false"},
            gateway={
                "scope": scope,
                "limit_usd": format_usd(found.limit),
                "settled_usd": format_usd(found.spent),
                "held_usd": format_usd(found.held),
                "needed_usd": format_usd(needed),
                "fits_max_tokens": fits,
                "resets_at": rfc3339(resets_at),
            },
        )


_WHOSE = {
    "key": "The budget of this API key",
    "user": "Your monthly budget",
    "org": "The monthly budget of your organization",
    "provider": "Today's budget of the model's provider",
    "outage": "What your organization may spend while the gateway's database is away",
}


def _bounded(organization: Organization) -> Organization:
    """As it is in an outage, whose bound is the operator's: nothing may cost more than is held, so
    that the policies that allow for an overrun are the usual ones."""
    policy = organization.unbounded_policy
    if policy is UnboundedPolicy.BOUNDED:
        policy = UnboundedPolicy.CLAMP
    return replace(organization, unbounded_policy=policy, on_exhausted=OnExhausted.CUT)


def figures(state: State, account: Account) -> Figures:
    """How one account stands."""
    balance = state.balances.get((account.name, account.period), _UNUSED)
    limit, remaining = account.limit, None
    if limit is not None:
        limit += balance.credited
        remaining = max(0, limit - balance.spent - balance.held)
    scope, _, name = account.name.partition(":")
    return Figures(
        scope,
        name,
        account.period,
        balance.spent,
        balance.held,
        limit,
        remaining,
        balance.count,
    )


def last_update(state: State, account: Account) -> str | None:
    """When it was last charged, granted something or corrected; None: not in this period."""
    balance = state.balances.get((account.name, account.period), _UNUSED)
    return rfc3339(balance.t) if balance.t else None


def tightest(state: State, accounts: tuple[Account, ...]) -> Figures:
    """How the account with the least remaining stands; without any limit, the user's own."""
    if len(accounts) == 1:
        return figures(state, accounts[0])
    least, found = None, accounts[min(1, len(accounts) - 1)]
    for account in accounts:
        limit = account.limit
        if limit is None:
            continue
        balance = state.balances.get((account.name, account.period), _UNUSED)
        rest = limit + balance.credited - balance.spent - balance.held
        if least is None or rest < least:
            least, found = rest, account
    return figures(state, found)


def fields(found: Figures) -> str:
    """The figures as header lines, each with its CR LF. Two decimals, as people read money."""
    lines = (
        f"x-gateway-scope: {found.scope}\r\n"
        f"x-gateway-usage-usd: {format_usd_short(found.spent)}\r\n"
        f"x-gateway-held-usd: {format_usd_short(found.held)}\r\n"
        f"x-gateway-reset: {_reset(found.period)}\r\n"
    )
    if found.limit is None or found.remaining is None:
        return lines
    return (
        f"{lines}x-gateway-limit-usd: {format_usd_short(found.limit)}\r\n"
        f"x-gateway-remaining-usd: {format_usd_short(found.remaining)}\r\n"
    )


@lru_cache(maxsize=64)
def _reset(period: str) -> str:
    return rfc3339(end_ms(period))
