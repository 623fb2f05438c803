"""The directory: the one way in which organizations, users and keys are changed.

Each change is decided on what memory knows, stored, and then applied to memory, one at a time. A
restriction (revoke, suspend) is applied first: it holds even when it cannot be stored.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Self, TypeVar

from gwproxy.core.errors import AlreadyExists, InvalidRequest, NotFound, StorageUnavailable
from gwproxy.core.identity import (
    DEFAULT_ORG_ID,
    ApiKey,
    Below,
    FailureMode,
    KeyKind,
    OnClientGone,
    OnExhausted,
    Organization,
    Status,
    UnboundedPolicy,
    User,
    digest,
    mint,
    mint_id,
    parse,
)
from gwproxy.core.money import Nanos
from gwproxy.state.keyring import Change, Keyring
from gwproxy.storage import directory as storage
from gwproxy.storage.database import Database

Row = TypeVar("Row", Organization, User, ApiKey)


class Directory:
    def __init__(
        self, database: Database, keyring: Keyring, now: Callable[[], float], below: Below
    ) -> None:
        self.keyring = keyring
        self._database = database
        self._now = now
        self._below = below
        self._changing = asyncio.Lock()
        self._owed: dict[str, Change] = {}

    @classmethod
    async def open(
        cls, database: Database, keyring: Keyring, now: Callable[[], float], below: Below
    ) -> Self:
        """Fill `keyring` from the database. `now` gives Unix seconds."""
        for row in await storage.load(database):
            keyring.apply(row)
        return cls(database, keyring, now, below)

    # -- organizations ---------------------------------------------------------------------------

    async def create_organization(
        self,
        *,
        org_id: str | None = None,
        name: str | None = None,
        status: Status = Status.ACTIVE,
        monthly_budget: Nanos | None = None,
        failure_mode: FailureMode | None = None,
        fallback_daily_limit: Nanos | None = None,
        allowed_features: tuple[str, ...] = (),
        prices: Mapping[str, Mapping[str, str]] | None = None,
        unbounded_policy: UnboundedPolicy = UnboundedPolicy.CLAMP,
        on_exhausted: OnExhausted = OnExhausted.CUT,
        on_client_gone: OnClientGone = OnClientGone.CLOSE,
        cache: bool = False,
    ) -> Organization:
        def decide() -> Organization:
            if org_id is not None and self.keyring.organization(org_id) is not None:
                raise AlreadyExists("There is an organization with this id.", param="org_id")
            return Organization(
                org_id=org_id or mint_id("org", self._below),
                name=name,
                status=status,
                monthly_budget=monthly_budget,
                failure_mode=failure_mode,
                fallback_daily_limit=fallback_daily_limit,
                allowed_features=allowed_features,
                prices=prices,
                unbounded_policy=unbounded_policy,
                on_exhausted=on_exhausted,
                on_client_gone=on_client_gone,
                cache=cache,
                created_at=int(self._now()),
            )

        return await self._create(decide)

    async def set_organization_status(self, org_id: str, status: Status) -> Organization:
        def decide() -> Organization:
            row = self.organization(org_id)
            return replace(row, status=status, version=row.version + 1)

        return await self._change(decide, restricts=status is Status.SUSPENDED)

    def organization(self, org_id: str) -> Organization:
        row = self.keyring.organization(org_id)
        if row is None or row.deleted_at is not None:
            raise NotFound("There is no organization with this id.")
        return row

    # -- users -----------------------------------------------------------------------------------

    async def create_user(
        self,
        *,
        user_id: str | None = None,
        org_id: str = DEFAULT_ORG_ID,
        email: str | None = None,
        status: Status = Status.ACTIVE,
        monthly_limit: Nanos | None = None,
        rpm: int | None = None,
        tpm: int | None = None,
        max_parallel: int | None = None,
    ) -> User:
        def decide() -> User:
            organization = self.keyring.organization(org_id)
            if organization is None or organization.deleted_at is not None:
                raise InvalidRequest("There is no organization with this id.", param="org_id")
            if user_id is not None and self.keyring.user(user_id) is not None:
                raise AlreadyExists("There is a user with this id.", param="user_id")
            if email is not None and self.keyring.user_with_email(email) is not None:
                raise AlreadyExists("There is a user with this e-mail address.", param="email")
            return User(
                user_id=user_id or mint_id("user", self._below),
                org_id=org_id,
                email=email,
                status=status,
                monthly_limit=monthly_limit,
                rpm=rpm,
                tpm=tpm,
                max_parallel=max_parallel,
                created_at=int(self._now()),
            )

        return await self._create(decide)

    async def set_user_status(self, user_id: str, status: Status) -> User:
        def decide() -> User:
            row = self.user(user_id)
            return replace(row, status=status, version=row.version + 1)

        return await self._change(decide, restricts=status is Status.SUSPENDED)

    def user(self, user_id: str) -> User:
        row = self.keyring.user(user_id)
        if row is None or row.deleted_at is not None:
            raise NotFound("There is no user with this id.")
        return row

    # -- keys ------------------------------------------------------------------------------------

    async def create_key(
        self,
        user_id: str,
        *,
        name: str | None = None,
        expires_at: int | None = None,
        allowed_models: tuple[str, ...] | None = None,
        monthly_limit: Nanos | None = None,
        rpm: int | None = None,
        tpm: int | None = None,
        max_parallel: int | None = None,
    ) -> tuple[ApiKey, str]:
        """The stored key and its text. The text is nowhere else: lost, it must be made anew."""
        text = mint(KeyKind.LIVE, self._below)

        def decide() -> ApiKey:
            self.user(user_id)
            created_at = int(self._now())
            if expires_at is not None and expires_at <= created_at:
                raise InvalidRequest("`expires_at` must lie in the future.", param="expires_at")
            parts = parse(text)
            return ApiKey(
                key_id=parts.key_id,
                user_id=user_id,
                prefix=parts.prefix,
                digest=digest(text),
                name=name,
                allowed_models=allowed_models,
                monthly_limit=monthly_limit,
                rpm=rpm,
                tpm=tpm,
                max_parallel=max_parallel,
                created_at=created_at,
                expires_at=expires_at,
            )

        return await self._create(decide), text

    async def revoke_key(self, user_id: str, key_id: str) -> ApiKey:
        """Refuse the key from the next request on; NotFound when it is not this user's, or gone."""

        def decide() -> ApiKey:
            row = self.keyring.key(key_id)
            if row is None or row.user_id != user_id:
                raise NotFound("This user has no key with this id.")
            if row.revoked_at is not None:
                if key_id in self._owed:
                    return row  # in force, and stored now at last
                raise NotFound("This user has no key with this id.")
            return replace(row, revoked_at=int(self._now()), version=row.version + 1)

        return await self._change(decide, restricts=True)

    # -- now and then ----------------------------------------------------------------------------

    async def flush(self) -> None:
        """Store what is owed, and when each key was last used. For a timer, and for the stop."""
        async with self._changing:
            await self._store_owed()
            uses = self.keyring.used_since_stored()
            if uses:
                await storage.update_last_used(self._database, uses)
                self.keyring.stored(uses)

    # -- the one way -----------------------------------------------------------------------------
    #
    # Both are shielded from the cancellation of their caller: a client that leaves between the
    # commit and its application would leave memory and storage apart.

    async def _create(self, decide: Callable[[], Row]) -> Row:
        async def create() -> Row:
            async with self._changing:
                row = decide()
                await self._store_owed()
                await storage.insert(self._database, row)
                self.keyring.apply(row)
                return row

        return await asyncio.shield(create())

    async def _change(self, decide: Callable[[], Row], *, restricts: bool) -> Row:
        async def change() -> Row:
            async with self._changing:
                row = decide()
                if restricts:
                    await self._apply_and_store(row)
                else:
                    await self._store_owed()
                    await storage.update(self._database, row)
                    self.keyring.apply(row)
                return row

        return await asyncio.shield(change())

    async def _apply_and_store(self, row: Change) -> None:
        self.keyring.apply(row)
        self._owed[_id(row)] = row
        try:
            await self._store_owed()
        except StorageUnavailable as error:
            raise StorageUnavailable(
                "In force at once, but not stored: it would be undone by a restart. Send it again.",
                retry_after_s=error.retry_after_s,
            ) from error

    async def _store_owed(self) -> None:
        """Restrictions that could not be stored go first: a later row builds on their version."""
        for row_id, row in list(self._owed.items()):
            await storage.update(self._database, row)
            del self._owed[row_id]


def _id(row: Change) -> str:
    """Unique among all rows: an organization and a user may bear the same id."""
    match row:
        case Organization():
            return f"organization/{row.org_id}"
        case User():
            return f"user/{row.user_id}"
        case ApiKey():
            return row.key_id
