"""Users' keys: create, list, revoke. The key itself leaves once, in the answer that creates it."""

from itertools import dropwhile, islice
from typing import Any

import msgspec
from aiohttp import web

from gwproxy.admin import body
from gwproxy.core.identity import ApiKey
from gwproxy.state.directory import Directory


class NewKey(msgspec.Struct, forbid_unknown_fields=True):
    name: str | None = None
    expires_at: body.Moment | None = None
    allowed_models: list[str] | None = None
    monthly_limit_usd: body.Usd = body.NULL
    rpm: body.Count | None = None
    tpm: body.Count | None = None
    max_parallel: body.Count | None = None


class Keys:
    def __init__(self, directory: Directory) -> None:
        self._directory = directory

    async def create(self, user_id: str, sent: bytes) -> dict[str, Any]:
        new = body.decode(sent, NewKey)
        models = body.names("allowed_models", new.allowed_models)
        if models == ():
            # Some would mean "none" by it and others "all": nobody shall find out by a bill.
            raise body.wrong("allowed_models", "must name a model, or be null for every model")
        key, text = await self._directory.create_key(
            user_id,
            name=body.text("name", new.name),
            expires_at=body.seconds("expires_at", new.expires_at),
            allowed_models=models,
            monthly_limit=body.usd("monthly_limit_usd", new.monthly_limit_usd),
            rpm=new.rpm,
            tpm=new.tpm,
            max_parallel=new.max_parallel,
        )
        return {"api_key": text, **self._shape(key)}

    def list(self, user_id: str, page: body.Page) -> dict[str, Any]:
        self._directory.user(user_id)
        keys = self._directory.keyring.keys_of(user_id)
        if page.cursor:
            keys = islice(dropwhile(lambda key: key.key_id != page.cursor, keys), 1, None)
        shown = (key for key in keys if page.deleted or key.revoked_at is None)
        return body.listing(shown, page, self._shape, lambda key: key.key_id)

    def _shape(self, key: ApiKey) -> dict[str, Any]:
        return {
            "key_id": key.key_id,
            "user_id": key.user_id,
            "prefix": key.prefix,
            "name": key.name,
            "allowed_models": key.allowed_models,
            "monthly_limit_usd": body.usd_out(key.monthly_limit),
            "rpm": key.rpm,
            "tpm": key.tpm,
            "max_parallel": key.max_parallel,
            "created_at": body.time_out(key.created_at),
            "expires_at": body.time_out(key.expires_at),
            "last_used_at": body.time_out(self._directory.keyring.last_used_at(key.key_id)),
            "revoked_at": body.time_out(key.revoked_at),
        }

    # -- over HTTP -------------------------------------------------------------------------------

    async def create_key(self, request: web.BaseRequest, user_id: str) -> web.StreamResponse:
        return body.answer(201, await self.create(user_id, await body.read(request)))

    async def list_keys(self, request: web.BaseRequest, user_id: str) -> web.StreamResponse:
        return body.answer(200, self.list(user_id, body.page(request)))

    async def revoke_key(
        self, request: web.BaseRequest, user_id: str, key_id: str
    ) -> web.StreamResponse:
        await self._directory.revoke_key(user_id, key_id)
        return body.no_content()
