"""The directory: the one way in which organizations, users and keys are changed.

Each change is decided on what memory knows, recorded and applied, in one step. What it restricts
(a key revoked, a limit lowered) holds from the next request on even if it cannot be recorded, and
is recorded as soon as it can be; what it allows needs its record first.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, TypedDict, TypeVar

from gwproxy.core.errors import (
    AlreadyExists,
    Conflict,
    InvalidRequest,
    NotFound,
    PreconditionFailed,
    StorageUnavailable,
)
from gwproxy.core.identity import (
    DEFAULT_ORG_ID,
    PUBLIC_CHARS,
    AdminKey,
    ApiKey,
    Below,
    FailureMode,
    KeyKind,
    OldSecret,
    OnClientGone,
    OnExhausted,
    Organization,
    Scope,
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
from gwproxy.core.restriction import restricted
from gwproxy.state.keyring import Change, Keyring
from gwproxy.state.ledger import Ledger, NotRecorded, RecordUncertain
from gwproxy.state.repeats import Repeats

Row = TypeVar("Row", Organization, User, ApiKey, AdminKey)

Versions = frozenset[int] | None
"""The versions of a row that a change was made for; None: whichever it is now."""


class Signature(TypedDict):
    actor: str
    address: str
    request_id: str
    idempotency_key: str | None


@dataclass(frozen=True, slots=True)
class Author:
    """Who asks for a change, from where and in which request."""

    actor: str = ""
    address: str = ""
    request_id: str = ""
    once: str | None = None
    """What the same request has again when it is sent twice."""

    def fields(self) -> Signature:
        """As a record has them."""
        return {
            "actor": self.actor,
            "address": self.address,
            "request_id": self.request_id,
            "idempotency_key": self.once,
        }


NOBODY: Final = Author()
"""The program itself."""


class Directory:
    def __init__(
        self,
        ledger: Ledger,
        keyring: Keyring,
        repeats: Repeats,
        below: Below,
        durable: Callable[[int], Awaitable[None]],
    ) -> None:
        """`keyring` is what the ledger's state applies admin records to."""
        self.keyring = keyring
        self.repeats = repeats
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
        by: Author = NOBODY,
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

        return await self._record("create", decide, by, again=self.keyring.organization)

    async def change_organization(
        self,
        org_id: str,
        changes: Mapping[str, Any],
        *,
        match: Versions = None,
        by: Author = NOBODY,
    ) -> Organization:
        """`changes` are fields of an Organization by name, checked."""

        def decide() -> Organization:
            row = self.organization(org_id)
            _same_version(row, match)
            return _changed(row, changes)

        return await self._record("update", decide, by)

    async def set_organization_status(self, org_id: str, status: Status) -> Organization:
        return await self.change_organization(org_id, {"status": status})

    async def delete_organization(
        self, org_id: str, *, match: Versions = None, by: Author = NOBODY
    ) -> None:
        """Its users can call no longer; what they have spent stays."""

        def decide() -> Organization:
            row = self.organization(org_id)
            _same_version(row, match)
            if org_id == DEFAULT_ORG_ID:
                raise Conflict("Users without an organization belong to this one: it has to stay.")
            return _changed(row, {"deleted_at": self._now_s()})

        await self._record("delete", decide, by)

    def organization(self, org_id: str, *, deleted: bool = False) -> Organization:
        """NotFound, where there is none; `deleted`: deleted ones are there too."""
        row = self.keyring.organization(org_id)
        if row is None or (row.deleted_at is not None and not deleted):
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
        by: Author = NOBODY,
    ) -> User:
        def decide() -> User:
            if user_id is not None and self.keyring.user(user_id) is not None:
                raise AlreadyExists("There is a user with this id.", param="user_id")
            self._check_user(user_id, org_id, email)
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

        return await self._record("create", decide, by, again=self.keyring.user)

    async def change_user(
        self,
        user_id: str,
        changes: Mapping[str, Any],
        *,
        match: Versions = None,
        by: Author = NOBODY,
    ) -> User:
        """`changes` are fields of a User by name, checked."""

        def decide() -> User:
            row = self.user(user_id)
            _same_version(row, match)
            after = _changed(row, changes)
            if after.org_id != row.org_id or after.email != row.email:
                self._check_user(user_id, after.org_id, after.email)
            return after

        return await self._record("update", decide, by)

    async def set_user_status(self, user_id: str, status: Status) -> User:
        return await self.change_user(user_id, {"status": status})

    async def delete_user(
        self, user_id: str, *, match: Versions = None, by: Author = NOBODY
    ) -> None:
        """None of the user's keys opens anything any longer; what was spent stays."""

        def decide() -> User:
            row = self.user(user_id)
            _same_version(row, match)
            return _changed(row, {"deleted_at": self._now_s()})

        await self._record("delete", decide, by)

    def _check_user(self, user_id: str | None, org_id: str, email: str | None) -> None:
        organization = self.keyring.organization(org_id)
        if organization is None or organization.deleted_at is not None:
            raise InvalidRequest("There is no organization with this id.", param="org_id")
        namesake = None if email is None else self.keyring.user_with_email(email)
        if namesake is not None and namesake.user_id != user_id:
            raise AlreadyExists("There is a user with this e-mail address.", param="email")

    def user(self, user_id: str, *, deleted: bool = False) -> User:
        """NotFound, where there is none; `deleted`: deleted ones are there too."""
        row = self.keyring.user(user_id)
        if row is None or (row.deleted_at is not None and not deleted):
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
        by: Author = NOBODY,
    ) -> tuple[ApiKey, str | None]:
        """The stored key and its text. The text is nowhere else: lost, it must be made anew; who
        asks for the same key again is told None."""
        text = mint(KeyKind.LIVE, self._below)

        def decide() -> ApiKey:
            self._check_opens(user_id)
            created_at = self._now_s()
            _check_expiry(expires_at, created_at)
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

        row = await self._record("create", decide, by, again=self.keyring.key)
        return row, text if row.digest == digest(text) else None

    async def rotate_key(
        self,
        user_id: str,
        key_id: str,
        grace_s: int,
        *,
        match: Versions = None,
        by: Author = NOBODY,
    ) -> tuple[ApiKey, str | None]:
        """Give a key a new secret, whose text is returned once. The one before is good for
        `grace_s` seconds more; what was spent belongs to the key, not to its secret."""
        text = ""

        def decide() -> ApiKey:
            nonlocal text
            row = self.key(user_id, key_id)
            _same_version(row, match)
            self._check_opens(user_id)
            now_s = self._now_s()
            kept = [old for old in row.previous if old.until > now_s]
            if grace_s:
                kept.append(OldSecret(row.digest, now_s + grace_s))
            if len(kept) > _MOST_SECRETS:
                raise Conflict(
                    f"{_MOST_SECRETS} secrets of this key are good still: wait until one ends, or "
                    "rotate with `grace_s` 0."
                )
            kind, public = KeyKind(row.prefix.split("_")[1]), row.prefix[-PUBLIC_CHARS:]
            text = mint(kind, self._below, public)
            return _changed(row, {"digest": digest(text), "previous": tuple(kept)})

        row = await self._record("rotate", decide, by, again=self.keyring.key)
        return row, text or None

    async def change_key(
        self,
        user_id: str,
        key_id: str,
        changes: Mapping[str, Any],
        *,
        match: Versions = None,
        by: Author = NOBODY,
    ) -> ApiKey:
        """`changes` are fields of an ApiKey by name, checked."""

        def decide() -> ApiKey:
            row = self.key(user_id, key_id)
            _same_version(row, match)
            if "expires_at" in changes:
                _check_expiry(changes["expires_at"], self._now_s())
            return _changed(row, changes)

        return await self._record("update", decide, by)

    async def revoke_key(
        self, user_id: str, key_id: str, *, match: Versions = None, by: Author = NOBODY
    ) -> ApiKey:
        """Refuse the key from the next request on; NotFound when it is not this user's, or gone."""

        def decide() -> ApiKey:
            row = self.key(user_id, key_id)
            _same_version(row, match)
            return _changed(row, {"revoked_at": self._now_s()})

        return await self._record("revoke", decide, by)

    def _check_opens(self, user_id: str) -> None:
        """Conflict where no secret of the user's would open anything."""
        if self.organization(self.user(user_id).org_id, deleted=True).deleted_at is not None:
            raise Conflict(
                "The organization of this user was deleted, and a key would open nothing: move the "
                "user to another organization first."
            )

    def key(self, user_id: str, key_id: str, *, deleted: bool = False) -> ApiKey:
        """NotFound where this user has no such key; `deleted`: revoked ones are there too."""
        self.user(user_id, deleted=deleted)
        row = self.keyring.key(key_id)
        if row is None or row.user_id != user_id or (row.revoked_at is not None and not deleted):
            raise NotFound("This user has no key with this id.")
        return row

    # -- administrators' keys --------------------------------------------------------------------

    async def create_admin_key(
        self,
        *,
        name: str | None = None,
        scope: Scope,
        expires_at: int | None = None,
        by: Author = NOBODY,
    ) -> tuple[AdminKey, str | None]:
        """As `create_key`."""
        text = mint(KeyKind.ADMIN, self._below)

        def decide() -> AdminKey:
            created_at = self._now_s()
            _check_expiry(expires_at, created_at)
            parts = parse(text)
            return AdminKey(
                key_id=parts.key_id,
                prefix=parts.prefix,
                digest=digest(text),
                name=name,
                scope=scope,
                created_at=created_at,
                expires_at=expires_at,
            )

        row = await self._record("create", decide, by, again=self.keyring.admin_key)
        return row, text if row.digest == digest(text) else None

    async def revoke_admin_key(
        self, key_id: str, *, match: Versions = None, by: Author = NOBODY
    ) -> None:
        def decide() -> AdminKey:
            row = self.admin_key(key_id)
            _same_version(row, match)
            return _changed(row, {"revoked_at": self._now_s()})

        await self._record("revoke", decide, by)

    def admin_key(self, key_id: str, *, deleted: bool = False) -> AdminKey:
        """NotFound where there is none; `deleted`: revoked ones are there too."""
        row = self.keyring.admin_key(key_id)
        if row is None or (row.revoked_at is not None and not deleted):
            raise NotFound("There is no admin key with this id.")
        return row

    # -- the one way -----------------------------------------------------------------------------

    async def _record(
        self,
        action: str,
        decide: Callable[[], Row],
        by: Author = NOBODY,
        *,
        again: Callable[[str], Row | None] | None = None,
    ) -> Row:
        """Decide, record, apply. StorageUnavailable where it could not be recorded: then nothing
        has changed but what it restricts. `again` finds the row of a request that was made before.
        """
        ledger = self._ledger
        made = self.repeats.find(by.once)
        if made is not None and made.id is not None and again is not None:
            found = again(made.id)
            assert found is not None, "rows are never deleted"
            if _is_gone(found):
                raise Conflict(
                    "This request was made before, and what it made is deleted by now: send it "
                    "under a new Idempotency-Key.",
                    code="idempotency_key_reused",
                    param="Idempotency-Key",
                )
            await self._durable(ledger.state.lsn)
            return found
        row = decide()
        before = self.keyring.same(row)
        if row is not before:
            try:
                ledger.admit()  # the room that is left may belong to settlements
                self._post(action, row, by)
            except RecordUncertain as error:
                raise StorageUnavailable(_UNSURE, retry_after_s=error.retry_after_s) from error
            except NotRecorded as error:
                tightened = before if before is None else restricted(before, row)
                if tightened is None or tightened is before:
                    raise
                self.keyring.apply(tightened)
                ledger.must(lambda: self._post(action, tightened, by))
                wait_s = error.retry_after_s
                raise StorageUnavailable(_NOT_RECORDED, retry_after_s=wait_s) from error
        await self._durable(ledger.state.lsn)
        return row

    def _post(self, action: str, row: Change, by: Author) -> None:
        stamp = self._ledger.stamp()
        match row:
            case Organization():
                record = Admin(**stamp, **by.fields(), action=action, org=row)
            case User():
                record = Admin(**stamp, **by.fields(), action=action, user=row)
            case ApiKey():
                record = Admin(**stamp, **by.fields(), action=action, key=row)
            case AdminKey():
                record = Admin(**stamp, **by.fields(), action=action, admin_key=row)
        self._ledger.post(record)

    def _now_s(self) -> int:
        return self._ledger.now_ms() // 1000


def _is_gone(row: Change) -> bool:
    if isinstance(row, (ApiKey, AdminKey)):
        return row.revoked_at is not None
    return row.deleted_at is not None


def _same_version(row: Change, match: Versions) -> None:
    if match is not None and row.version not in match:
        raise PreconditionFailed("Somebody has changed it meanwhile: read it again.")


def _changed(row: Row, changes: Mapping[str, Any]) -> Row:
    """`row` with `changes`; the very same one when they are none."""
    if all(getattr(row, name) == value for name, value in changes.items()):
        return row
    return replace(row, **changes, version=row.version + 1)


def _check_expiry(expires_at: int | None, now_s: int) -> None:
    if expires_at is not None and expires_at <= now_s:
        raise InvalidRequest("`expires_at` must lie in the future.", param="expires_at")


_MOST_SECRETS: Final = 5
"""Old ones of a key at a time: each is one more that could have leaked."""

_NOT_RECORDED = "In force at once, but not recorded yet: a restart now would undo it."
_UNSURE = "In force at once, but it is not known whether it was recorded: send it again."
