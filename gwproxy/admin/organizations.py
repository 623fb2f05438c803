"""Organizations: create, list, show."""

from typing import Any

import msgspec
from aiohttp import web

from gwproxy.admin import body
from gwproxy.core.identity import (
    FailureMode,
    OnClientGone,
    OnExhausted,
    Organization,
    Status,
    UnboundedPolicy,
)
from gwproxy.core.money import format_rate, parse_rate
from gwproxy.state.directory import Directory


class NewPrice(msgspec.Struct, forbid_unknown_fields=True):
    """USD per million tokens."""

    input: body.Usd
    output: body.Usd
    cache_read: body.Usd = body.NULL
    cache_write: body.Usd = body.NULL


class NewOrganization(msgspec.Struct, forbid_unknown_fields=True):
    org_id: str | None = None
    name: str | None = None
    status: Status = Status.ACTIVE
    monthly_budget_usd: body.Usd = body.NULL
    failure_mode: FailureMode | None = None
    fallback_daily_limit_usd: body.Usd = body.NULL
    allowed_features: list[str] = msgspec.field(default_factory=list)
    prices: dict[str, NewPrice] | None = None
    unbounded_policy: UnboundedPolicy = UnboundedPolicy.CLAMP
    on_exhausted: OnExhausted = OnExhausted.CUT
    on_client_gone: OnClientGone = OnClientGone.CLOSE
    cache: bool = False


class Organizations:
    def __init__(self, directory: Directory) -> None:
        self._directory = directory

    async def create(self, sent: bytes) -> dict[str, Any]:
        new = body.decode(sent, NewOrganization)
        organization = await self._directory.create_organization(
            org_id=body.identifier("org_id", new.org_id),
            name=body.text("name", new.name),
            status=new.status,
            monthly_budget=body.usd("monthly_budget_usd", new.monthly_budget_usd),
            failure_mode=new.failure_mode,
            fallback_daily_limit=body.usd("fallback_daily_limit_usd", new.fallback_daily_limit_usd),
            allowed_features=body.names("allowed_features", new.allowed_features) or (),
            prices=_prices(new.prices),
            unbounded_policy=new.unbounded_policy,
            on_exhausted=new.on_exhausted,
            on_client_gone=new.on_client_gone,
            cache=new.cache,
        )
        return shape(organization)

    def list(self, page: body.Page) -> dict[str, Any]:
        organizations = self._directory.keyring.organizations_after(page.cursor)
        shown = (row for row in organizations if page.deleted or row.deleted_at is None)
        return body.listing(shown, page, shape, lambda row: row.org_id)

    def show(self, org_id: str) -> dict[str, Any]:
        return shape(self._directory.organization(org_id))

    # -- over HTTP -------------------------------------------------------------------------------

    async def create_organization(self, request: web.BaseRequest) -> web.StreamResponse:
        return body.answer(201, await self.create(await body.read(request)))

    async def list_organizations(self, request: web.BaseRequest) -> web.StreamResponse:
        return body.answer(200, self.list(body.page(request)))

    async def show_organization(self, request: web.BaseRequest, org_id: str) -> web.StreamResponse:
        return body.answer(200, self.show(org_id))


def _prices(prices: dict[str, NewPrice] | None) -> dict[str, dict[str, str]] | None:
    """Each price checked and written anew, in the exact decimals in which it will be read."""
    if not prices:
        return None
    body.names("prices", [*prices])
    checked: dict[str, dict[str, str]] = {}
    for model, price in prices.items():
        checked[model] = {
            name: format_rate(body.exact("prices", written, parse_rate))
            for name in NewPrice.__struct_fields__
            if (written := bytes(getattr(price, name))) != b"null"
        }
    return checked


def shape(organization: Organization) -> dict[str, Any]:
    return {
        "org_id": organization.org_id,
        "name": organization.name,
        "status": organization.status,
        "monthly_budget_usd": body.usd_out(organization.monthly_budget),
        "failure_mode": organization.failure_mode,
        "fallback_daily_limit_usd": body.usd_out(organization.fallback_daily_limit),
        "allowed_features": organization.allowed_features,
        "prices": organization.prices,
        "unbounded_policy": organization.unbounded_policy,
        "on_exhausted": organization.on_exhausted,
        "on_client_gone": organization.on_client_gone,
        "cache": organization.cache,
        "created_at": body.time_out(organization.created_at),
        "deleted_at": body.time_out(organization.deleted_at),
    }
