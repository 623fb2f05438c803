"""Grants and resets: what an account may spend on top this month, and what is taken off what it has
spent. Both are entries of the ledger, with who and why."""

import msgspec

from gwproxy.admin import body as checked
from gwproxy.admin.ask import Answer, Ask, Route
from gwproxy.admin.body import SomeUsd, Text
from gwproxy.admin.usage import OrganizationUsage, Usage, UserUsage
from gwproxy.core.money import Nanos
from gwproxy.state.store import Store

_BY_DEFAULT = "reset-quota"


class Grant(msgspec.Struct, forbid_unknown_fields=True):
    """For the month that it is now."""

    amount_usd: SomeUsd
    reason: Text


class Reset(msgspec.Struct, forbid_unknown_fields=True):
    reason: Text | None = None


class Quota:
    def __init__(self, store: Store, usage: Usage) -> None:
        self._store = store
        self._usage = usage

    def routes(self) -> tuple[Route, ...]:
        return (
            Route(
                method="POST",
                path="/admin/users/{user_id}/grants",
                do=self.grant_user,
                summary="Let a user spend more this month.",
                body=Grant,
                answers=UserUsage,
                status=201,
            ),
            Route(
                method="POST",
                path="/admin/organizations/{org_id}/grants",
                do=self.grant_organization,
                summary="Let an organization spend more this month.",
                body=Grant,
                answers=OrganizationUsage,
                status=201,
            ),
            Route(
                method="POST",
                path="/admin/users/{user_id}/reset-quota",
                do=self.reset_user,
                summary="Take off a user's own account what it has spent this month.",
                body=Reset,
                answers=UserUsage,
            ),
        )

    async def grant_user(self, ask: Ask, user_id: str, body: Grant) -> Answer:
        amount, reason = _granted(body)
        self._store.directory.user(user_id)
        await self._store.adjustments.grant(f"user:{user_id}", amount, reason, ask.by)
        return Answer(self._usage.user(user_id))

    async def grant_organization(self, ask: Ask, org_id: str, body: Grant) -> Answer:
        amount, reason = _granted(body)
        self._store.directory.organization(org_id)
        await self._store.adjustments.grant(f"org:{org_id}", amount, reason, ask.by)
        return Answer(self._usage.organization(org_id))

    async def reset_user(self, ask: Ask, user_id: str, body: Reset) -> Answer:
        reason = checked.text("reason", body.reason) or _BY_DEFAULT
        self._store.directory.user(user_id)
        await self._store.adjustments.reset(f"user:{user_id}", reason, ask.by)
        return Answer(self._usage.user(user_id))


def _granted(sent: Grant) -> tuple[Nanos, str]:
    amount = checked.usd("amount_usd", sent.amount_usd)
    if not amount:
        raise checked.wrong("amount_usd", "must be above 0")
    reason = checked.text("reason", sent.reason)
    assert reason is not None, "it is no null"
    return amount, reason
