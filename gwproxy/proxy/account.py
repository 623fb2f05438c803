"""The caller's own view of his money: `GET /v1/usage` and `GET /v1/receipts/{request_id}`.

Answered from memory, so that it holds in an outage of the database too; older receipts are read
from the database.
"""

from collections.abc import Awaitable, Callable
from typing import Any, Final

from aiohttp import web

from gwproxy.core.errors import NotFound
from gwproxy.core.ledger import Request
from gwproxy.core.money import format_rate, format_usd
from gwproxy.core.period import rfc3339
from gwproxy.core.trace import Trace
from gwproxy.proxy.answer import json_answer
from gwproxy.state.accounts import Accounts, figures, last_update
from gwproxy.state.keyring import Keyring
from gwproxy.state.ledger import Ledger
from gwproxy.state.outage import Outage
from gwproxy.storage.reports import Corrected

LAST: Final = 20
"""Requests that the usage view shows."""

_RECEIPT: Final = "A receipt shows up here once its request was admitted; a refusal has none."

_ARCHIVED: Final = (
    "Requests of {} and before are in the operator's archive, and no longer here: ask him for them."
)


class AccountHandler:
    def __init__(
        self,
        keyring: Keyring,
        accounts: Accounts,
        ledger: Ledger,
        outage: Outage,
        *,
        find: Callable[[str], Awaitable[Request | None]],
        corrections: Callable[[Request], Awaitable[list[Corrected] | None]],
        archived: Callable[[], str | None],
        clock: Callable[[], float],
    ) -> None:
        """`find` looks a request up in the database, `corrections` what was corrected of it there
        (None: nobody can tell now), `archived` says up to which month it is not
        there any more; `clock` gives seconds since 1970."""
        self._keyring = keyring
        self._accounts = accounts
        self._ledger = ledger
        self._outage = outage
        self._find = find
        self._corrections = corrections
        self._archived = archived
        self._clock = clock

    async def usage(self, request: web.BaseRequest, trace: Trace) -> web.StreamResponse:
        """How each account of the caller's stands, and the last requests of his key."""
        principal = trace.principal = self._keyring.authenticate(
            request.headers, self._clock(), request.remote
        )
        ledger = self._ledger
        organization = self._keyring.organization_of(principal)
        degraded = self._outage.lost and self._accounts.terms.serves_open(organization)
        payer = self._accounts.payer(principal, ledger.periods(), degraded=degraded)
        return json_answer(
            {
                "scopes": [
                    {
                        **figures(ledger.state, account).json(),
                        "last_update": last_update(ledger.state, account),
                    }
                    for account in payer.accounts
                ],
                "requests": [_line(each) for each in ledger.recent.of_key(principal.key_id, LAST)],
                "as_of_lsn": ledger.state.lsn,
            },
            trace.request_id,
            degraded=degraded,
        )

    async def receipt(
        self, request: web.BaseRequest, trace: Trace, request_id: str
    ) -> web.StreamResponse:
        """One request of the caller's own user; NotFound for everybody else's."""
        principal = trace.principal = self._keyring.authenticate(
            request.headers, self._clock(), request.remote
        )
        found = self._ledger.find(request_id) or await self._find(request_id)
        if found is None or found.user_id != principal.user_id:
            until = self._archived()
            older = f" {_ARCHIVED.format(until)}" if until else ""
            raise NotFound(f"You have no request with this id. {_RECEIPT}{older}")
        corrected = None if self._outage.lost else await self._corrections(found)
        return json_answer(
            {**receipt(found), **_corrected(found.cost or 0, corrected)}, trace.request_id
        )


def _corrected(cost: int, corrected: list[Corrected] | None) -> dict[str, Any]:
    """What became of the cost since then; null where the database cannot be asked."""
    if corrected is None:
        return {"corrections": None}
    lines = []
    for one in corrected:
        cost += one.amount
        lines.append(
            {"created_at": rfc3339(one.t), "cost_usd": format_usd(cost), "reason": one.reason}
        )
    return {"corrections": lines}


def receipt(found: Request) -> dict[str, Any]:
    """One request, fully explained."""
    fresh, read, write, output, reasoning = found.tokens
    return {
        **_line(found),
        "attempts": [
            {
                "attempt": number,
                "provider": tried.provider,
                "model": tried.model,
                "status": tried.status,
                "error_type": tried.error_type or None,
                "reason": tried.reason or None,
                "duration_ms": tried.duration_ms,
                "cost_usd": format_usd(tried.cost),
            }
            for number, tried in enumerate(found.attempts, start=1)
        ],
        "tokens": {
            "input": fresh,
            "cache_read": read,
            "cache_write": write,
            "output": output,
            "reasoning": reasoning,
        },
        "source": found.source,
        "price_version": found.prices,
        "formula": formula(found),
        "held_usd": format_usd(found.held),
        "overrun_usd": format_usd(found.overrun),
        "truncated": found.outcome in ("truncated", "cut"),
        "client_left": found.outcome == "client_left",
        "edits": list(found.edits),
        "cf_aig_log_id": found.log_id or None,
    }


def formula(found: Request) -> str | None:
    """How the cost came about, to be checked by hand; None where there is no single one."""
    if found.rates is None:
        return None
    names = ("input", "cache read", "cache write", "output")
    parts = [
        f"{tokens} {name} x {format_rate(rate)}"
        for tokens, name, rate in zip(found.tokens, names, found.rates, strict=False)
        if tokens
    ]
    cost = format_usd(found.cost or 0)
    return f"({' + '.join(parts) or '0'}) USD per 1,000,000 tokens, rounded up = {cost} USD"


def _line(found: Request) -> dict[str, Any]:
    return {
        "request_id": found.id,
        "created_at": rfc3339(found.t),
        "outcome": found.outcome,
        "model_requested": found.model,
        "provider": found.provider,
        "model": found.upstream_model,
        "cost_usd": None if found.cost is None else format_usd(found.cost),
        "degraded": found.degraded,
    }
