"""Organizations: create, list, show, change, delete."""

from typing import Any

import msgspec

from gwproxy.admin import body as checked
from gwproxy.admin.ask import Answer, Ask
from gwproxy.admin.body import UNSET, Id, ShownTime, ShownUsd, Text, Unset, Usd, UsdRate
from gwproxy.core import identity
from gwproxy.core.identity import FailureMode, OnClientGone, OnExhausted, Status, UnboundedPolicy
from gwproxy.core.money import format_rate
from gwproxy.core.request import Feature
from gwproxy.state.directory import Directory


class NewPrice(msgspec.Struct, forbid_unknown_fields=True):
    """USD per million tokens."""

    input: UsdRate
    output: UsdRate
    cache_read: UsdRate | Unset = UNSET
    cache_write: UsdRate | Unset = UNSET


class OrganizationChange(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What is not sent stays as it is; null takes a limit away."""

    name: Text | Unset | None = UNSET
    status: Status | Unset = UNSET
    monthly_budget_usd: Usd | Unset = UNSET
    failure_mode: FailureMode | Unset | None = UNSET
    fallback_daily_limit_usd: Usd | Unset = UNSET
    allowed_features: list[Feature] | Unset = UNSET
    prices: dict[Text, NewPrice] | Unset | None = UNSET
    unbounded_policy: UnboundedPolicy | Unset = UNSET
    on_exhausted: OnExhausted | Unset = UNSET
    on_client_gone: OnClientGone | Unset = UNSET
    cache: bool | Unset = UNSET


class NewOrganization(OrganizationChange):
    """All fields may be left out."""

    org_id: Id | None = None


class Organization(msgspec.Struct):
    org_id: Id
    name: str | None
    status: Status
    monthly_budget_usd: ShownUsd | None
    failure_mode: FailureMode | None
    fallback_daily_limit_usd: ShownUsd | None
    allowed_features: tuple[str, ...]
    prices: dict[str, dict[str, str]] | None
    unbounded_policy: UnboundedPolicy
    on_exhausted: OnExhausted
    on_client_gone: OnClientGone
    cache: bool
    created_at: ShownTime
    deleted_at: ShownTime | None


class OrganizationPage(msgspec.Struct):
    data: list[Organization]
    next_cursor: str | None


class OrganizationQuery(checked.Page, frozen=True):
    status: Status | None = None


class Organizations:
    def __init__(self, directory: Directory) -> None:
        self._directory = directory

    async def create(self, ask: Ask, body: NewOrganization) -> Answer:
        org_id = checked.identifier("org_id", body.org_id)
        return _answer(
            await self._directory.create_organization(org_id=org_id, **fields(body), by=ask.by)
        )

    async def list(self, ask: Ask, query: OrganizationQuery) -> Answer:
        def wanted(row: identity.Organization) -> bool:
            kept = row.deleted_at is None or query.deleted
            return kept and query.status in (None, row.status)

        rows = self._directory.keyring.organizations_after(checked.cursor(query))
        page = await checked.listing(rows, query, wanted, shape, lambda row: row.org_id)
        return Answer(OrganizationPage(*page))

    async def show(self, ask: Ask, org_id: str, query: checked.Shown) -> Answer:
        return _answer(self._directory.organization(org_id, deleted=query.deleted))

    async def change(self, ask: Ask, org_id: str, body: OrganizationChange) -> Answer:
        changes = fields(body)
        return _answer(
            await self._directory.change_organization(org_id, changes, match=ask.match, by=ask.by)
        )

    async def delete(self, ask: Ask, org_id: str) -> Answer:
        await self._directory.delete_organization(org_id, match=ask.match, by=ask.by)
        return Answer()


_AS_SENT = ("status", "failure_mode", "unbounded_policy", "on_exhausted", "on_client_gone", "cache")


def fields(sent: OrganizationChange) -> dict[str, Any]:
    """What was sent, checked, by the names of the directory."""
    found = {name: value for name in _AS_SENT if (value := getattr(sent, name)) is not UNSET}
    if not isinstance(sent.name, Unset):
        found["name"] = checked.text("name", sent.name)
    if not isinstance(sent.monthly_budget_usd, Unset):
        found["monthly_budget"] = checked.usd("monthly_budget_usd", sent.monthly_budget_usd)
    if not isinstance(sent.fallback_daily_limit_usd, Unset):
        found["fallback_daily_limit"] = checked.usd(
            "fallback_daily_limit_usd", sent.fallback_daily_limit_usd
        )
    if not isinstance(sent.allowed_features, Unset):
        found["allowed_features"] = tuple(dict.fromkeys(sent.allowed_features))
    if not isinstance(sent.prices, Unset):
        found["prices"] = _prices(sent.prices)
    return found


def _prices(prices: dict[str, NewPrice] | None) -> dict[str, dict[str, str]] | None:
    """Each price checked and written anew, in the exact decimals in which it will be read."""
    if not prices:
        return None
    checked.names("prices", [*prices])
    found: dict[str, dict[str, str]] = {}
    for model, price in prices.items():
        found[model] = {
            name: format_rate(checked.rate("prices", written))
            for name in NewPrice.__struct_fields__
            if (raw := getattr(price, name)) is not UNSET and (written := bytes(raw)) != b"null"
        }
    return found


def _answer(row: identity.Organization) -> Answer:
    return Answer(shape(row), row.version)


def shape(row: identity.Organization) -> Organization:
    prices = row.prices
    return Organization(
        org_id=row.org_id,
        name=row.name,
        status=row.status,
        monthly_budget_usd=checked.usd_out(row.monthly_budget),
        failure_mode=row.failure_mode,
        fallback_daily_limit_usd=checked.usd_out(row.fallback_daily_limit),
        allowed_features=row.allowed_features,
        prices=None if prices is None else {model: {**prices[model]} for model in prices},
        unbounded_policy=row.unbounded_policy,
        on_exhausted=row.on_exhausted,
        on_client_gone=row.on_client_gone,
        cache=row.cache,
        created_at=checked.time_of(row.created_at),
        deleted_at=checked.time_out(row.deleted_at),
    )
