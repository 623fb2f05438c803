"""The directory: the one way in which organizations, users and keys are changed.

Each change is decided on what memory knows, recorded and applied, in one step. A restriction
(revoke, suspend) that cannot be recorded is applied all the same: it holds from the next request
on, and is recorded as soon as it can be.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import TypeVar

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
from gwproxy.core.records import Admin
from gwproxy.state.keyring import Keyring
from gwproxy.state.ledger import Ledger, NotRecorded, RecordUncertain

Row = TypeVar("Row", Organization, User, ApiKey)


class Directory:
    def __init__(
        self,
        ledger: Ledger,
        keyring: Keyring,
        below: Below,
        durable: Callable[[int], Awaitable[None]],
    ) -> None:
        """`keyring` is what the ledger's state applies admin records to."""
        self.keyring = keyring
        self._ledger = ledger
        self._below = below
        self._durable = durable

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
                created_at=self._now_s(),
            )

        return await self._record("create", decide)

    async def set_organization_status(self, org_id: str, status: Status) -> Organization:
        def decide() -> Organization:
            row = self.organization(org_id)
            return replace(row, status=status, version=row.version + 1)

        return await self._record("update", decide, restricts=status is Status.SUSPENDED)

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
                created_at=self._now_s(),
            )

        return await self._record("create", decide)

    async def set_user_status(self, user_id: str, status: Status) -> User:
        def decide() -> User:
            row = self.user(user_id)
            return replace(row, status=status, version=row.version + 1)

        return await self._record("update", decide, restricts=status is Status.SUSPENDED)

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
            created_at = self._now_s()
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

        return await self._record("create", decide), text

    async def revoke_key(self, user_id: str, key_id: str) -> ApiKey:
        """Refuse the key from the next request on; NotFound when it is not this user's, or gone."""

        def decide() -> ApiKey:
            row = self.keyring.key(key_id)
            if row is None or row.user_id != user_id:
                raise NotFound("This user has no key with this id.")
            if row.revoked_at is not None:
                raise NotFound("This user has no key with this id.")
            return replace(row, revoked_at=self._now_s(), version=row.version + 1)

        return await self._record("revoke", decide, restricts=True)

    # -- the one way -----------------------------------------------------------------------------

    async def _record(
        self, action: str, decide: Callable[[], Row], *, restricts: bool = False
    ) -> Row:
        """Decide, record, apply. StorageUnavailable where it could not be recorded: then nothing
        has changed, unless it `restricts`."""
        ledger = self._ledger
        row = decide()
        try:
            ledger.pay()
            self._post(action, row)
        except RecordUncertain as error:
            raise StorageUnavailable(_UNSURE, retry_after_s=error.retry_after_s) from error
        except NotRecorded as error:
            if not restricts:
                raise
            self.keyring.apply(row)
            ledger.must(lambda: self._post(action, row))
            raise StorageUnavailable(_NOT_RECORDED, retry_after_s=error.retry_after_s) from error
        await self._durable(ledger.state.lsn)
        return row

    def _post(self, action: str, row: Organization | User | ApiKey) -> None:
        stamp = self._ledger.stamp()
        match row:
            case Organization():
                record = Admin(**stamp, action=action, org=row)
            case User():
                record = Admin(**stamp, action=action, user=row)
            case ApiKey():
                record = Admin(**stamp, action=action, key=row)
        self._ledger.post(record)

    def _now_s(self) -> int:
        return self._ledger.now_ms() // 1000


_NOT_RECORDED = "In force at once, but not recorded yet: a restart now would undo it."
_UNSURE = "In force at once, but it is not known whether it was recorded: send it again."
