"""Users' keys: create, list, show, change, revoke. The key itself leaves once, in the answer that
creates it."""

from itertools import dropwhile, islice
from typing import Annotated, Any, Final

import msgspec

from gwproxy.admin import body as checked
from gwproxy.admin.ask import Answer, Ask
from gwproxy.admin.body import UNSET, Count, Id, Moment, ShownTime, ShownUsd, Text, Unset, Usd
from gwproxy.core import identity
from gwproxy.core.errors import NotFound
from gwproxy.state.directory import Directory

_LONGEST_GRACE_S: Final = 90 * 86_400
"""A quarter: what has not changed over by then never will."""


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
    previous_valid_until: ShownTime | None
    """Until when the last of the secrets that it had before is accepted."""
    last_used_at: ShownTime | None
    last_used_from: str | None
    use_count: int
    revoked_at: ShownTime | None


class CreatedKey(Key):
    """With the key itself: it is nowhere else, and is not shown again. Null where the same request
    had been answered before."""

    api_key: str | None


class Rotation(msgspec.Struct, forbid_unknown_fields=True):
    """For how many seconds the secret before is good still."""

    grace_s: Annotated[int, msgspec.Meta(ge=0, le=_LONGEST_GRACE_S)] = 86_400


class FoundQuery(checked.Shown, frozen=True):
    sha256: Annotated[str | None, msgspec.Meta(description="SHA-256 of the whole key, in hex")] = (
        None
    )


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
        def wanted(row: identity.ApiKey) -> bool:
            return query.deleted or self._ended_at(row) is None

        def shape(row: identity.ApiKey) -> Key:
            return Key(**self._shown(row))

        self._directory.user(user_id, deleted=query.deleted)
        rows = self._directory.keyring.keys_of(user_id)
        if after := checked.cursor(query):
            rows = islice(dropwhile(lambda row: row.key_id != after, rows), 1, None)
        page = await checked.listing(rows, query, wanted, shape, lambda row: row.key_id)
        return Answer(KeyPage(*page))

    async def show(self, ask: Ask, user_id: str, key_id: str, query: checked.Shown) -> Answer:
        row = self._directory.key(user_id, key_id, deleted=query.deleted)
        return Answer(Key(**self._shown(row)), row.version)

    async def find(self, ask: Ask, key_id: str, query: FoundQuery) -> Answer:
        """A key by its id alone, and where a hash is sent only if it is one of its secrets'."""
        row = self._directory.keyring.key(key_id)
        if row is None or (self._ended_at(row) is not None and not query.deleted):
            raise NotFound("There is no key with this id.")
        digests = [row.digest, *(old.digest for old in row.previous)]
        if query.sha256 is not None and query.sha256 not in [each.hex() for each in digests]:
            raise NotFound("There is no key with this id and this secret.")
        return Answer(Key(**self._shown(row)), row.version)

    async def change(self, ask: Ask, user_id: str, key_id: str, body: KeyChange) -> Answer:
        changes = _fields(body)
        row = await self._directory.change_key(user_id, key_id, changes, match=ask.match, by=ask.by)
        return Answer(Key(**self._shown(row)), row.version)

    async def rotate(self, ask: Ask, user_id: str, key_id: str, body: Rotation) -> Answer:
        row, text = await self._directory.rotate_key(
            user_id, key_id, body.grace_s, match=ask.match, by=ask.by
        )
        return Answer(CreatedKey(api_key=text, **self._shown(row)), row.version)

    async def revoke(self, ask: Ask, user_id: str, key_id: str) -> Answer:
        await self._directory.revoke_key(user_id, key_id, match=ask.match, by=ask.by)
        return Answer()

    def _shown(self, row: identity.ApiKey) -> dict[str, Any]:
        use = self._directory.keyring.use(row.key_id)
        previous = max((old.until for old in row.previous), default=None)
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
            "previous_valid_until": checked.time_out(previous),
            "last_used_at": checked.time_out(use.at or None),
            "last_used_from": use.address,
            "use_count": use.count,
            "revoked_at": checked.time_out(self._ended_at(row)),
        }

    def _ended_at(self, row: identity.ApiKey) -> int | None:
        """When it was revoked, by itself or with its user or his organization."""
        user = self._directory.user(row.user_id, deleted=True)
        organization = self._directory.organization(user.org_id, deleted=True)
        ends = (row.revoked_at, user.deleted_at, organization.deleted_at)
        return min((end for end in ends if end is not None), default=None)


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
