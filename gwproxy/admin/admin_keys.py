"""Administrators' own keys: create, list, show, revoke. They open this plane and nothing else."""

from itertools import dropwhile, islice
from typing import Any

import msgspec

from gwproxy.admin import body as checked
from gwproxy.admin.ask import Answer, Ask, Route
from gwproxy.admin.body import Id, Moment, ShownTime, Text
from gwproxy.admin.keys import FoundQuery
from gwproxy.core import identity
from gwproxy.core.errors import NotFound
from gwproxy.core.identity import Scope
from gwproxy.state.directory import Directory


class NewAdminKey(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """All fields may be left out. Without a scope it may read only."""

    name: Text | None = None
    scope: Scope = Scope.READ
    expires_at: Moment | None = None


class AdminKey(msgspec.Struct, kw_only=True):
    key_id: Id
    prefix: str
    name: str | None
    scope: Scope
    created_at: ShownTime
    expires_at: ShownTime | None
    last_used_at: ShownTime | None
    last_used_from: str | None
    use_count: int
    revoked_at: ShownTime | None


class CreatedAdminKey(AdminKey):
    """With the key itself: it is nowhere else, and is not shown again. Null where the same request
    had been answered before."""

    admin_key: str | None


class AdminKeyPage(msgspec.Struct):
    data: list[AdminKey]
    next_cursor: str | None


class AdminKeys:
    def __init__(self, directory: Directory) -> None:
        self._directory = directory

    def routes(self) -> tuple[Route, ...]:
        several, one = "/admin/admin-keys", "/admin/admin-keys/{key_id}"
        return (
            Route(
                method="POST",
                path=several,
                do=self.create,
                summary="Create an admin key. Its text is in this answer and nowhere else.",
                body=NewAdminKey,
                answers=CreatedAdminKey,
                status=201,
            ),
            Route(
                method="GET",
                path=several,
                do=self.list,
                summary="List admin keys, oldest first.",
                query=checked.Page,
                answers=AdminKeyPage,
            ),
            Route(
                method="GET",
                path=one,
                do=self.show,
                summary="Show an admin key, without its text.",
                query=FoundQuery,
                answers=AdminKey,
            ),
            Route(
                method="DELETE",
                path=one,
                do=self.revoke,
                summary="Revoke an admin key: it is refused from the next request on.",
                status=204,
                conditional=True,
            ),
        )

    async def create(self, ask: Ask, body: NewAdminKey) -> Answer:
        row, text = await self._directory.create_admin_key(
            name=checked.text("name", body.name),
            scope=body.scope,
            expires_at=checked.seconds("expires_at", body.expires_at),
            by=ask.by,
        )
        return Answer(CreatedAdminKey(admin_key=text, **self._shown(row)), row.version)

    async def list(self, ask: Ask, query: checked.Page) -> Answer:
        def wanted(row: identity.AdminKey) -> bool:
            return row.revoked_at is None or query.deleted

        def shape(row: identity.AdminKey) -> AdminKey:
            return AdminKey(**self._shown(row))

        rows = self._directory.keyring.admin_keys()
        if after := checked.cursor(query):
            rows = islice(dropwhile(lambda row: row.key_id != after, rows), 1, None)
        page = await checked.listing(rows, query, wanted, shape, lambda row: row.key_id)
        return Answer(AdminKeyPage(*page))

    async def show(self, ask: Ask, key_id: str, query: FoundQuery) -> Answer:
        row = self._directory.admin_key(key_id, deleted=query.deleted)
        if query.sha256 not in (None, row.digest.hex()):
            raise NotFound("There is no admin key with this id and this secret.")
        return Answer(AdminKey(**self._shown(row)), row.version)

    async def revoke(self, ask: Ask, key_id: str) -> Answer:
        await self._directory.revoke_admin_key(key_id, match=ask.match, by=ask.by)
        return Answer()

    def _shown(self, row: identity.AdminKey) -> dict[str, Any]:
        use = self._directory.keyring.use(row.key_id)
        return {
            "key_id": row.key_id,
            "prefix": row.prefix,
            "name": row.name,
            "scope": row.scope,
            "created_at": checked.time_of(row.created_at),
            "expires_at": checked.time_out(row.expires_at),
            "last_used_at": checked.time_out(use.at or None),
            "last_used_from": use.address,
            "use_count": use.count,
            "revoked_at": checked.time_out(row.revoked_at),
        }
