"""Users' keys: create, list, show, change, revoke. The key itself leaves once, in the answer that
creates it."""

from itertools import dropwhile, islice
from typing import Any

import msgspec

from gwproxy.admin import body as checked
from gwproxy.admin.ask import Answer, Ask
from gwproxy.admin.body import UNSET, Count, Id, Moment, ShownTime, ShownUsd, Text, Unset, Usd
from gwproxy.core import identity
from gwproxy.state.directory import Directory


class KeyChange(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What is not sent stays as it is; null takes a limit away."""

    name: Text | Unset | None = UNSET
    expires_at: Moment | Unset | None = UNSET
    allowed_models: list[Text] | Unset | None = UNSET
    monthly_limit_usd: Usd | Unset = UNSET
    rpm: Count | Unset | None = UNSET
    tpm: Count | Unset | None = UNSET
    max_parallel: Count | Unset | None = UNSET


class NewKey(KeyChange):
    """All fields may be left out."""


class Key(msgspec.Struct, kw_only=True):
    key_id: Id
    user_id: Id
    prefix: str
    name: str | None
    allowed_models: tuple[str, ...] | None
    monthly_limit_usd: ShownUsd | None
    rpm: int | None
    tpm: int | None
    max_parallel: int | None
    created_at: ShownTime
    expires_at: ShownTime | None
    last_used_at: ShownTime | None
    revoked_at: ShownTime | None


class CreatedKey(Key):
    """With the key itself: it is nowhere else, and is not shown again."""

    api_key: str


class KeyPage(msgspec.Struct):
    data: list[Key]
    next_cursor: str | None


class Keys:
    def __init__(self, directory: Directory) -> None:
        self._directory = directory

    async def create(self, ask: Ask, user_id: str, body: NewKey) -> Answer:
        row, text = await self._directory.create_key(user_id, **_fields(body), by=ask.by)
        return Answer(CreatedKey(api_key=text, **self._shown(row)), row.version)

    async def list(self, ask: Ask, user_id: str, query: checked.Page) -> Answer:
        def shown(row: identity.ApiKey) -> Key | None:
            gone = row.revoked_at is not None and not query.deleted
            return None if gone else Key(**self._shown(row))

        self._directory.user(user_id, deleted=query.deleted)
        rows = self._directory.keyring.keys_of(user_id)
        if after := checked.cursor(query):
            rows = islice(dropwhile(lambda row: row.key_id != after, rows), 1, None)
        return Answer(KeyPage(*checked.listing(rows, query, shown, lambda row: row.key_id)))

    async def show(self, ask: Ask, user_id: str, key_id: str, query: checked.Shown) -> Answer:
        row = self._directory.key(user_id, key_id, deleted=query.deleted)
        return Answer(Key(**self._shown(row)), row.version)

    async def change(self, ask: Ask, user_id: str, key_id: str, body: KeyChange) -> Answer:
        changes = _fields(body)
        row = await self._directory.change_key(user_id, key_id, changes, match=ask.match, by=ask.by)
        return Answer(Key(**self._shown(row)), row.version)

    async def revoke(self, ask: Ask, user_id: str, key_id: str) -> Answer:
        await self._directory.revoke_key(user_id, key_id, match=ask.match, by=ask.by)
        return Answer()

    def _shown(self, row: identity.ApiKey) -> dict[str, Any]:
        return {
            "key_id": row.key_id,
            "user_id": row.user_id,
            "prefix": row.prefix,
            "name": row.name,
            "allowed_models": row.allowed_models,
            "monthly_limit_usd": checked.usd_out(row.monthly_limit),
            "rpm": row.rpm,
            "tpm": row.tpm,
            "max_parallel": row.max_parallel,
            "created_at": checked.time_of(row.created_at),
            "expires_at": checked.time_out(row.expires_at),
            "last_used_at": checked.time_out(self._directory.keyring.last_used_at(row.key_id)),
            "revoked_at": checked.time_out(row.revoked_at),
        }


def _fields(sent: KeyChange) -> dict[str, Any]:
    """What was sent, checked, by the names of the directory."""
    found: dict[str, Any] = {
        name: value
        for name in ("rpm", "tpm", "max_parallel")
        if (value := getattr(sent, name)) is not UNSET
    }
    if not isinstance(sent.name, Unset):
        found["name"] = checked.text("name", sent.name)
    if not isinstance(sent.expires_at, Unset):
        found["expires_at"] = checked.seconds("expires_at", sent.expires_at)
    if not isinstance(sent.allowed_models, Unset):
        found["allowed_models"] = models = checked.names("allowed_models", sent.allowed_models)
        if models == ():
            # Some would mean "none" by it and others "all": nobody shall find out by a bill.
            raise checked.wrong("allowed_models", "must name a model, or be null for every model")
    if not isinstance(sent.monthly_limit_usd, Unset):
        found["monthly_limit"] = checked.usd("monthly_limit_usd", sent.monthly_limit_usd)
    return found
