"""Reconciliation with the gateway's log: the corrections that it led to, and how it stood last."""

from typing import Annotated, Any, Literal

import msgspec

from gwproxy.admin.ask import Answer, Ask, Route
from gwproxy.admin.body import ShownTime, ShownUsd, Usd, usd
from gwproxy.core.errors import InvalidRequest
from gwproxy.core.money import format_usd
from gwproxy.core.reconcile import Correction
from gwproxy.state import corrections
from gwproxy.state.store import Store

Reason = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
RequestId = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]


class NewCorrection(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """`charged_usd` is what the request is charged now: who thinks otherwise changes nothing."""

    request_id: RequestId
    charged_usd: Usd
    cost_usd: Usd
    reason: Reason


class Corrections(msgspec.Struct, forbid_unknown_fields=True):
    corrections: Annotated[
        list[NewCorrection], msgspec.Meta(min_length=1, max_length=corrections.MOST)
    ]


class Corrected(msgspec.Struct):
    request_id: str
    result: Literal["applied", "already", "changed", "unknown"]


class CorrectedList(msgspec.Struct):
    data: list[Corrected]


class Side(msgspec.Struct):
    """Lines of one kind: how many, what each side says they cost, and theirs less ours."""

    count: int
    ours_usd: ShownUsd
    theirs_usd: ShownUsd
    drift_usd: ShownUsd


class LastRun(msgspec.Struct, kw_only=True):
    """`from` is null where nothing was reconciled yet."""

    since: ShownTime | None = msgspec.field(default=None, name="from")
    until: ShownTime | None = msgspec.field(default=None, name="to")
    kinds: dict[str, Side] = {}
    corrections: int = 0
    log_is_whole: bool = True


class Reconciliation:
    def __init__(self, store: Store) -> None:
        self._store = store

    def routes(self) -> list[Route]:
        return [
            Route(
                method="POST",
                path="/admin/reconcile",
                do=self.correct,
                summary="Correct what requests were charged.",
                body=Corrections,
                answers=CorrectedList,
            ),
            Route(
                method="GET",
                path="/admin/reconcile",
                do=self.last,
                summary="How the last reconciliation came out.",
                answers=LastRun,
            ),
        ]

    async def correct(self, ask: Ask, body: Corrections) -> Answer:
        wanted = [_read(one) for one in body.corrections]
        if len({one.request_id for one in wanted}) < len(wanted):
            raise InvalidRequest("`corrections` names a request twice.", param="corrections")
        done = await corrections.apply(self._store, wanted, ask.by.actor)
        return Answer(
            CorrectedList(
                [
                    Corrected(one.request_id, result.value)
                    for one, result in zip(wanted, done, strict=True)
                ]
            )
        )

    async def last(self, ask: Ask) -> Answer:
        found = self._store.gateway_side.last()
        return Answer(LastRun() if found is None else _last(found))


def _read(one: NewCorrection) -> Correction:
    charged, cost = usd("charged_usd", one.charged_usd), usd("cost_usd", one.cost_usd)
    if charged is None or cost is None:
        raise InvalidRequest("`charged_usd` and `cost_usd` are amounts.", param="cost_usd")
    return Correction(one.request_id, charged, cost, one.reason)


def _last(found: dict[str, Any]) -> LastRun:
    return LastRun(
        since=found["from"],
        until=found["to"],
        kinds={
            kind: Side(
                line["count"],
                *(format_usd(line[f"{side}_nanos"]) for side in ("ours", "theirs", "drift")),
            )
            for kind, line in found["kinds"].items()
        },
        corrections=found["corrections"]["count"],
        log_is_whole=found["log_is_whole"],
    )
