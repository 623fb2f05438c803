"""Users: create, list, show."""

from typing import Any

import msgspec
from aiohttp import web

from gwproxy.admin import body
from gwproxy.core.identity import DEFAULT_ORG_ID, Status, User
from gwproxy.state.directory import Directory


class NewUser(msgspec.Struct, forbid_unknown_fields=True):
    user_id: str | None = None
    org_id: str | None = None
    email: str | None = None
    monthly_limit_usd: body.Usd = body.NULL
    rpm: body.Count | None = None
    tpm: body.Count | None = None
    max_parallel: body.Count | None = None
    status: Status = Status.ACTIVE


class Users:
    def __init__(self, directory: Directory) -> None:
        self._directory = directory

    async def create(self, sent: bytes) -> dict[str, Any]:
        new = body.decode(sent, NewUser)
        user = await self._directory.create_user(
            user_id=body.identifier("user_id", new.user_id),
            org_id=body.identifier("org_id", new.org_id) or DEFAULT_ORG_ID,
            email=body.email("email", new.email),
            status=new.status,
            monthly_limit=body.usd("monthly_limit_usd", new.monthly_limit_usd),
            rpm=new.rpm,
            tpm=new.tpm,
            max_parallel=new.max_parallel,
        )
        return shape(user)

    def list(self, page: body.Page) -> dict[str, Any]:
        users = self._directory.keyring.users_after(page.cursor)
        shown = (user for user in users if page.deleted or user.deleted_at is None)
        return body.listing(shown, page, shape, lambda user: user.user_id)

    def show(self, user_id: str) -> dict[str, Any]:
        return shape(self._directory.user(user_id))

    # -- over HTTP -------------------------------------------------------------------------------

    async def create_user(self, request: web.BaseRequest) -> web.StreamResponse:
        return body.answer(201, await self.create(await body.read(request)))

    async def list_users(self, request: web.BaseRequest) -> web.StreamResponse:
        return body.answer(200, self.list(body.page(request)))

    async def show_user(self, request: web.BaseRequest, user_id: str) -> web.StreamResponse:
        return body.answer(200, self.show(user_id))


def shape(user: User) -> dict[str, Any]:
    return {
        "user_id": user.user_id,
        "org_id": user.org_id,
        "email": user.email,
        "status": user.status,
        "monthly_limit_usd": body.usd_out(user.monthly_limit),
        "rpm": user.rpm,
        "tpm": user.tpm,
        "max_parallel": user.max_parallel,
        "created_at": body.time_out(user.created_at),
        "deleted_at": body.time_out(user.deleted_at),
    }
