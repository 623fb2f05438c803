"""Corrections of what requests were charged, found by the reconciliation: each one an entry of its
own beside the settlement, with who and why, and none of them twice.
"""

import asyncio
from collections.abc import Sequence
from enum import StrEnum
from typing import Final

from gwproxy.core.ledger import Key
from gwproxy.core.period import periods
from gwproxy.core.reconcile import Correction
from gwproxy.core.records import Adjust
from gwproxy.state.store import Store
from gwproxy.storage import reports
from gwproxy.storage.reports import Charged

MOST: Final = 200
"""Corrections at once: a body of moderate size."""

_BREATHE_AFTER: Final = 20
"""Records written in one go: less than a millisecond in which nobody else is served."""


class Done(StrEnum):
    """What became of a correction."""

    APPLIED = "applied"
    ALREADY = "already"
    CHANGED = "changed"
    """The request is not charged what the correction was made for."""
    UNKNOWN = "unknown"
    """There is no such request, or it is still open."""


async def apply(store: Store, wanted: Sequence[Correction], actor: str) -> list[Done]:
    """Post each of them that still holds; StorageUnavailable when not even the look is possible.

    What was posted before a failure stays, and is found `already` there at the next try.
    """
    await store.catch_up()
    charged = await reports.charged(store.database, [one.request_id for one in wanted])
    ledger = store.ledger
    await store.archive.fetch([key for one in charged.values() for key in _accounts(store, one)])
    done = []
    for number, one in enumerate(wanted, 1):
        done.append(_apply(store, one, charged.get(one.request_id), actor))
        if number % _BREATHE_AFTER == 0:
            await asyncio.sleep(0)
    if Done.APPLIED in done:
        await store.durable(ledger.state.lsn)
    return done


def _apply(store: Store, wanted: Correction, found: Charged | None, actor: str) -> Done:
    ledger = store.ledger
    if found is None:
        return Done.UNKNOWN
    # The number of the correction, so that the same one sent twice is one, and a later one is not.
    key = f"reconcile:{found.id}:{found.corrections}"
    if key in ledger.state.idempotency or found.cost == wanted.cost:
        return Done.ALREADY
    if found.cost != wanted.charged:
        return Done.CHANGED
    ledger.admit()
    ledger.post(
        Adjust(
            **ledger.stamp(),
            accounts=tuple(_accounts(store, found)),
            delta=wanted.cost - wanted.charged,
            type="reconcile",
            actor=actor,
            reason=wanted.reason,
            r=found.lsn,
            idempotency_key=key,
        )
    )
    return Done.APPLIED


def _accounts(store: Store, found: Charged) -> list[Key]:
    """The caller's own of the request's month, and its provider's of the day where one is kept."""
    accounts = [
        (f"key:{found.key_id}", found.period),
        (f"user:{found.user_id}", found.period),
        (f"org:{found.org_id}", found.period),
    ]
    provider = (f"provider:{found.provider}", periods(found.t)[1])
    if provider in store.ledger.state.balances:
        accounts.append(provider)
    return accounts
