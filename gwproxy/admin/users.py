"""Users: create, list, show, change, delete."""

from collections.abc import Iterable
from typing import Annotated, Any

import msgspec

from gwproxy.admin import body as checked
from gwproxy.admin.ask import Answer, Ask
from gwproxy.admin.body import UNSET, Count, Email, Id, ShownTime, ShownUsd, Unset, Usd
from gwproxy.core import identity
from gwproxy.core.identity import DEFAULT_ORG_ID, Status
from gwproxy.state.directory import Directory


class UserChange(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What is not sent stays as it is; null takes a limit away."""

    org_id: Id | Unset | None = UNSET
    email: Email | Unset | None = UNSET
    monthly_limit_usd: Usd | Unset = UNSET
    rpm: Count | Unset | None = UNSET
    tpm: Count | Unset | None = UNSET
    max_parallel: Count | Unset | None = UNSET
    status: Status | Unset = UNSET


class NewUser(UserChange):
    """All fields may be left out. Without an organization a user belongs to `default`."""

    user_id: Id | None = None


class User(msgspec.Struct):
    user_id: Id
    org_id: Id
    email: str | None
    status: Status
    monthly_limit_usd: ShownUsd | None
    rpm: int | None
    tpm: int | None
    max_parallel: int | None
    created_at: ShownTime
    deleted_at: ShownTime | None


class UserPage(msgspec.Struct):
    data: list[User]
    next_cursor: str | None


class MemberQuery(checked.Page, frozen=True):
    status: Status | None = None


class UserQuery(MemberQuery, frozen=True):
    org_id: Annotated[str | None, msgspec.Meta(description="those of one organization")] = None
    email: Annotated[str | None, msgspec.Meta(description="the one with this address")] = None


class Users:
    def __init__(self, directory: Directory) -> None:
        self._directory = directory

    async def create(self, ask: Ask, body: NewUser) -> Answer:
        user_id = checked.identifier("user_id", body.user_id)
        return _answer(
            await self._directory.create_user(user_id=user_id, **fields(body), by=ask.by)
        )

    async def list(self, ask: Ask, query: UserQuery) -> Answer:
        if query.email is None:
            rows = self._directory.keyring.users_after(checked.cursor(query), query.org_id)
            return await _page(rows, query)
        found = self._directory.keyring.user_with_email(query.email)
        if found is None or query.org_id not in (None, found.org_id):
            return Answer(UserPage([], None))
        return await _page([found], query)

    async def members(self, ask: Ask, org_id: str, query: MemberQuery) -> Answer:
        """The users of an organization."""
        self._directory.organization(org_id, deleted=query.deleted)
        rows = self._directory.keyring.users_after(checked.cursor(query), org_id)
        return await _page(rows, query)

    async def show(self, ask: Ask, user_id: str, query: checked.Shown) -> Answer:
        return _answer(self._directory.user(user_id, deleted=query.deleted))

    async def change(self, ask: Ask, user_id: str, body: UserChange) -> Answer:
        changes = fields(body)
        return _answer(
            await self._directory.change_user(user_id, changes, match=ask.match, by=ask.by)
        )

    async def delete(self, ask: Ask, user_id: str) -> Answer:
        await self._directory.delete_user(user_id, match=ask.match, by=ask.by)
        return Answer()


def fields(sent: UserChange) -> dict[str, Any]:
    """What was sent, checked, by the names of the directory."""
    found: dict[str, Any] = {
        name: value
        for name in ("rpm", "tpm", "max_parallel", "status")
        if (value := getattr(sent, name)) is not UNSET
    }
    if not isinstance(sent.org_id, Unset):
        found["org_id"] = checked.identifier("org_id", sent.org_id) or DEFAULT_ORG_ID
    if not isinstance(sent.email, Unset):
        found["email"] = checked.email("email", sent.email)
    if not isinstance(sent.monthly_limit_usd, Unset):
        found["monthly_limit"] = checked.usd("monthly_limit_usd", sent.monthly_limit_usd)
    return found


async def _page(rows: Iterable[identity.User], query: MemberQuery) -> Answer:
    def wanted(row: identity.User) -> bool:
        kept = row.deleted_at is None or query.deleted
        return kept and query.status in (None, row.status)

    page = await checked.listing(rows, query, wanted, shape, lambda row: row.user_id)
    return Answer(UserPage(*page))


def _answer(row: identity.User) -> Answer:
    return Answer(shape(row), row.version)


def shape(row: identity.User) -> User:
    return User(
        user_id=row.user_id,
        org_id=row.org_id,
        email=row.email,
        status=row.status,
        monthly_limit_usd=checked.usd_out(row.monthly_limit),
        rpm=row.rpm,
        tpm=row.tpm,
        max_parallel=row.max_parallel,
        created_at=checked.time_of(row.created_at),
        deleted_at=checked.time_out(row.deleted_at),
    )
