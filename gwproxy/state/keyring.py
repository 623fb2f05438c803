"""The keyring: every organization, user and key, in memory, and the one question asked of it.

`authenticate` and `apply` never wait, so a change holds for the very next request. What is applied
was stored before (`state/directory.py`); this room trusts it.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from heapq import merge
from typing import Final, TypeVar

from multidict import MultiMapping, istr

from gwproxy.core.errors import AccountSuspended, InvalidApiKey
from gwproxy.core.identity import (
    MAX_KEY_CHARS,
    AdminKey,
    ApiKey,
    Organization,
    Principal,
    Status,
    User,
    digest,
    well_formed,
)
from gwproxy.storage.directory import Use

Change = Organization | User | ApiKey | AdminKey
"""A change of the directory is the whole row as it stands afterwards."""

Row = TypeVar("Row", Organization, User, ApiKey, AdminKey)

_CHALLENGE: Final = {"WWW-Authenticate": 'Bearer realm="gwproxy"'}  # RFC 9110 11.6.1 wants one

# `istr` has its casefold done already: three look-ups a request that need not do it again.
_AUTHORIZATION: Final = istr("Authorization")
_ACTIVE: Final = Status.ACTIVE  # looked up once: an enum's members cost 0.1 us each time
_KEY_HEADERS: Final = (istr("x-api-key"), istr("api-key"))


def unauthorized(message: str) -> InvalidApiKey:
    return InvalidApiKey(message, headers=_CHALLENGE)


def presented_key(headers: MultiMapping[str]) -> str | None:
    """The one credential of a request, from whichever header the caller's SDK uses.

    None when there is none. Headers that disagree are refused: a proxy in front of us may have
    checked the other one.
    """
    found: str | None = None
    lines = headers.getall(_AUTHORIZATION, ())
    if lines:
        scheme, _, found = lines[0].partition(" ")
        if len(lines) > 1:
            raise unauthorized("More than one Authorization header was sent.")
        if scheme.lower() != "bearer":
            raise unauthorized("The Authorization header must be `Bearer` followed by an API key.")
        found = found.strip(" ")
    for name in _KEY_HEADERS:
        if name not in headers:
            continue
        for value in headers.getall(name):
            if found is not None and value != found:
                raise unauthorized("Two different API keys were sent in one request.")
            found = value
    return found


MISSING: Final = "No API key was sent. Send it as `Authorization: Bearer <your key>`."
_MALFORMED: Final = (
    "This is not a complete API key: a character may be missing or mistyped. "
    "Copy the whole key again, from gw_ to its last character."
)
# One answer for unknown, revoked and expired: a stranger learns nothing about a key he found.
_INVALID: Final = (
    "This API key is not valid. It may have been revoked or have expired: "
    "ask whoever runs this gateway for a new one."
)
_USER_SUSPENDED: Final = "This account is suspended. Ask whoever runs this gateway."
_ORG_SUSPENDED: Final = "Your organization's account is suspended. Ask whoever runs this gateway."


@dataclass(slots=True)
class _Use:
    """How a key was used, with whichever secret."""

    key_id: str
    at: float
    address: str | None
    count: int
    stored: bool = True


@dataclass(slots=True)
class _Door:
    """What a secret opens, made when its key changes so that a request only has to look."""

    key: ApiKey
    principal: Principal
    expires_at: int | None
    use: _Use


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Memory as it will be once `file` is in force."""

    file: str
    organizations: dict[str, Organization]
    users: dict[str, User]
    emails: dict[str, str]
    org_order: list[str]
    user_order: list[str]
    members: dict[str, list[str]]
    principals: list[tuple[_Door, Principal]]
    """Of the keys whose users have moved."""


class Keyring:
    def __init__(self) -> None:
        self._organizations: dict[str, Organization] = {}
        self._users: dict[str, User] = {}
        self._doors: dict[bytes, _Door] = {}
        self._doors_by_id: dict[str, _Door] = {}
        self._used: list[_Use] = []  # since it was last stored
        self._admin_keys: dict[str, AdminKey] = {}
        self._admin_keys_by_digest: dict[bytes, AdminKey] = {}
        self._admin_uses: dict[str, _Use] = {}
        self._key_ids: dict[str, list[str]] = {}  # by user, in the order of creation
        self._emails: dict[str, str] = {}
        # Kept sorted so that a page of a long list costs a binary search, not a sort.
        self._org_order: list[str] = []
        self._user_order: list[str] = []
        self._members: dict[str, list[str]] = {}  # by organization
        self.version = 0
        """Another one after each change: what was made of rows is good for one version."""
        self._meanwhile: list[Change] | None = None
        """What has changed since an import was begun."""
        self.prepared: Prepared | None = None

    # -- the hot path ----------------------------------------------------------------------------

    def authenticate(
        self, headers: MultiMapping[str], now: float, address: str | None = None
    ) -> Principal:
        """Who sent these headers, from `address`; InvalidApiKey (401) or AccountSuspended (403).

        The look-up is by digest in a dict: no comparison whose time depends on a secret. An admin
        key never calls a model.
        """
        key = presented_key(headers)
        if key is None:
            raise unauthorized(MISSING)
        door = self._doors.get(digest(key)) if len(key) <= MAX_KEY_CHARS else None
        if door is None:
            # Which words he gets is found out only now: whoever has a key need not wait for it.
            raise unauthorized(_INVALID if well_formed(key) else _MALFORMED)
        if door.key.revoked_at is not None or key.startswith("gw_admin_"):
            raise unauthorized(_INVALID)
        expires_at = door.expires_at
        if expires_at is not None and now >= expires_at:
            raise unauthorized(_INVALID)
        principal = door.principal
        user = self._users[principal.user_id]
        organization = self._organizations[principal.org_id]
        if user.deleted_at is not None or organization.deleted_at is not None:
            raise unauthorized(_INVALID)
        if user.status is not _ACTIVE:
            raise AccountSuspended(_USER_SUSPENDED)
        if organization.status is not _ACTIVE:
            raise AccountSuspended(_ORG_SUSPENDED)
        self._use(door.use, now, address)
        return principal

    def _use(self, use: "_Use", now: float, address: str | None) -> None:
        use.at = now
        use.address = address
        use.count += 1
        if use.stored:
            use.stored = False
            self._used.append(use)

    def limited(self, principal: Principal) -> tuple[ApiKey, User]:
        """The key and the user whose limits hold for this caller, as they are now."""
        return self._doors_by_id[principal.key_id].key, self._users[principal.user_id]

    def organization_of(self, principal: Principal) -> Organization:
        return self._organizations[principal.org_id]

    # -- changes ---------------------------------------------------------------------------------

    def apply(self, change: Change) -> None:
        """Make memory equal to `change`. Applying the same one twice changes nothing."""
        self.version += 1
        if self._meanwhile is not None:
            self._meanwhile.append(change)
        match change:
            case Organization():
                if change.org_id not in self._organizations:
                    _put(self._org_order, change.org_id)
                    self._members.setdefault(change.org_id, [])
                self._organizations[change.org_id] = change
            case User():
                self._apply_user(change)
            case ApiKey():
                self._apply_key(change)
            case AdminKey():
                self._admin_keys[change.key_id] = change
                self._admin_keys_by_digest[change.digest] = change
                if change.key_id not in self._admin_uses:
                    self._admin_uses[change.key_id] = _use_of(change)

    def _apply_user(self, user: User) -> None:
        before = self._users.get(user.user_id)
        if before is None:
            _put(self._user_order, user.user_id)
            _put(self._members[user.org_id], user.user_id)
        elif before.email is not None and self._emails.get(before.email.lower()) == user.user_id:
            del self._emails[before.email.lower()]
        if user.email is not None and user.deleted_at is None:
            self._emails[user.email.lower()] = user.user_id
        self._users[user.user_id] = user
        if before is not None and before.org_id != user.org_id:
            _take_out(self._members[before.org_id], user.user_id)
            _put(self._members[user.org_id], user.user_id)
            for key_id in self._key_ids.get(user.user_id, ()):
                self._apply_key(self._doors_by_id[key_id].key)

    def _apply_key(self, key: ApiKey) -> None:
        known = self._doors_by_id.get(key.key_id)
        if known is None:
            use = _use_of(key)
            self._key_ids.setdefault(key.user_id, []).append(key.key_id)
        else:
            use = known.use
            for digest in _digests(known.key):
                del self._doors[digest]
        principal = self._principal(key)
        door = _Door(key, principal, key.expires_at, use)
        self._doors[key.digest] = self._doors_by_id[key.key_id] = door
        for old in key.previous:
            until = old.until if key.expires_at is None else min(old.until, key.expires_at)
            self._doors[old.digest] = _Door(key, principal, until, use)

    def _principal(self, key: ApiKey) -> Principal:
        return _principal(key, self._users[key.user_id].org_id)

    # -- many changes at once --------------------------------------------------------------------

    @contextmanager
    def watch(self) -> Iterator[list[Change]]:
        """The changes that come while many others are prepared."""
        assert self._meanwhile is None, "one import at a time"
        self._meanwhile = []
        try:
            yield self._meanwhile
        finally:
            self._meanwhile = self.prepared = None

    def prepare(
        self, organizations: Mapping[str, Organization], users: Mapping[str, User], file: str
    ) -> Iterator[None]:
        """Build what memory will be with these rows, a slice each turn: `prepared`, in the end.

        What changes meanwhile and is not among these rows may be in it or not.
        """
        # At one moment, since the addresses have to be those of these very users.
        new_users, emails = dict(self._users), dict(self._emails)
        new_organizations = {**self._organizations, **organizations}
        members = self._members | {name: [] for name in organizations if name not in self._members}
        came: dict[str, list[str]] = {}
        left: dict[str, set[str]] = {}
        principals: list[tuple[_Door, Principal]] = []
        added: list[str] = []
        for number, user in enumerate(users.values()):
            if number % _SLICE == 0:
                yield
            before = new_users.get(user.user_id)
            if before is None:
                added.append(user.user_id)
            elif before.email is not None and emails.get(before.email.lower()) == user.user_id:
                del emails[before.email.lower()]
            if before is None or before.org_id != user.org_id:
                came.setdefault(user.org_id, []).append(user.user_id)
            if before is not None and before.org_id != user.org_id:
                left.setdefault(before.org_id, set()).add(user.user_id)
                for key_id in self._key_ids.get(user.user_id, ()):
                    key = self._doors_by_id[key_id].key
                    principal = _principal(key, user.org_id)
                    principals += [(self._doors[each], principal) for each in _digests(key)]
            if user.email is not None and user.deleted_at is None:
                emails[user.email.lower()] = user.user_id
            new_users[user.user_id] = user
        org_order: list[str] = []
        user_order: list[str] = []
        yield from _merged(self._org_order, [*organizations], frozenset(), org_order)
        yield from _merged(self._user_order, added, frozenset(), user_order)
        for org_id in came.keys() | left.keys():
            members[org_id], old = [], members[org_id]
            yield from _merged(old, came.get(org_id, []), left.get(org_id, set()), members[org_id])
        self.prepared = Prepared(
            file=file,
            organizations=new_organizations,
            users=new_users,
            emails=emails,
            org_order=org_order,
            user_order=user_order,
            members=members,
            principals=principals,
        )

    def take(self, prepared: "Prepared") -> None:
        """Put in force what was prepared, and what came meanwhile."""
        self.version += 1
        self._organizations, self._users = prepared.organizations, prepared.users
        self._emails, self._members = prepared.emails, prepared.members
        self._org_order, self._user_order = prepared.org_order, prepared.user_order
        for door, principal in prepared.principals:
            door.principal = principal
        for change in [*(self._meanwhile or ())]:
            self.apply(change)

    # -- looking around --------------------------------------------------------------------------

    def same(self, row: Row) -> Row | None:
        """What stands here now in the place of `row`."""
        found: Change | None
        match row:
            case Organization():
                found = self._organizations.get(row.org_id)
            case User():
                found = self._users.get(row.user_id)
            case ApiKey():
                found = self.key(row.key_id)
            case AdminKey():
                found = self._admin_keys.get(row.key_id)
        return found

    def organization(self, org_id: str) -> Organization | None:
        return self._organizations.get(org_id)

    def user(self, user_id: str) -> User | None:
        return self._users.get(user_id)

    def user_with_email(self, email: str) -> User | None:
        user_id = self._emails.get(email.lower())
        return None if user_id is None else self._users[user_id]

    def key(self, key_id: str) -> ApiKey | None:
        door = self._doors_by_id.get(key_id)
        return None if door is None else door.key

    def use(self, key_id: str) -> Use:
        """How a key, an administrator's too, was used so far; `at` 0: not at all."""
        return _shown(self._use_by_id(key_id))

    def _use_by_id(self, key_id: str) -> _Use:
        return self._admin_uses.get(key_id) or self._doors_by_id[key_id].use

    def admin_key(self, key_id: str) -> AdminKey | None:
        return self._admin_keys.get(key_id)

    def admin_key_of(self, digest: bytes) -> AdminKey | None:
        return self._admin_keys_by_digest.get(digest)

    def used_by_admin(self, key_id: str, now: float, address: str | None) -> None:
        """Note that this admin key has opened the plane."""
        self._use(self._admin_uses[key_id], now, address)

    def admin_keys(self) -> Iterable[AdminKey]:
        """Revoked ones too, oldest first."""
        return self._admin_keys.values()

    def organizations_after(self, org_id: str) -> Iterable[Organization]:
        """The organizations whose ids come after `org_id`, deleted ones too, in that order."""
        order = self._org_order
        for place in range(bisect_right(order, org_id), len(order)):
            yield self._organizations[order[place]]

    def users_after(self, user_id: str, org_id: str | None = None) -> Iterable[User]:
        """The users whose ids come after `user_id`, deleted ones too; `org_id`: only its own."""
        order = self._user_order if org_id is None else self._members.get(org_id, [])
        for place in range(bisect_right(order, user_id), len(order)):
            yield self._users[order[place]]

    def keys_of(self, user_id: str) -> Iterable[ApiKey]:
        """The user's keys, revoked ones too, oldest first."""
        for key_id in self._key_ids.get(user_id, ()):
            yield self._doors_by_id[key_id].key

    def used_since_stored(self) -> list[Use]:
        """How each key was used that was since this was last stored; `not_stored` gives it back."""
        used, self._used = self._used, []
        for use in used:
            use.stored = True
        return [_shown(use) for use in used]

    def not_stored(self, uses: Iterable[Use]) -> None:
        for each in uses:
            use = self._use_by_id(each.key_id)
            if use.stored:
                use.stored = False
                self._used.append(use)


def _digests(key: ApiKey) -> list[bytes]:
    return [key.digest, *(old.digest for old in key.previous)]


def _use_of(key: ApiKey | AdminKey) -> _Use:
    return _Use(key.key_id, float(key.last_used_at or 0), key.last_used_from, key.use_count)


def _shown(use: _Use) -> Use:
    return Use(use.key_id, int(use.at), use.address, use.count)


def _principal(key: ApiKey, org_id: str) -> Principal:
    return Principal(
        key_id=key.key_id,
        user_id=key.user_id,
        org_id=org_id,
        key_name=key.name,
        allowed_models=key.allowed_models,
    )


def _put(order: list[str], name: str) -> None:
    place = bisect_left(order, name)
    if place == len(order) or order[place] != name:
        order.insert(place, name)


def _take_out(order: list[str], name: str) -> None:
    place = bisect_left(order, name)
    if place < len(order) and order[place] == name:
        del order[place]


_SLICE: Final = 500
"""Rows of an import in one go: a few tenths of a millisecond, in which no stream moves."""


def _merged(old: list[str], new: list[str], without: Set[str], into: list[str]) -> Iterator[None]:
    """Put the names of both into `into`, in their order and each once, a slice each turn."""
    runs = [[*old]]  # the old one may change between two turns
    for start in range(0, len(new), _SLICE):
        runs.append(sorted(new[start : start + _SLICE]))
        yield
    last = None
    for number, name in enumerate(merge(*runs)):
        if number % _SLICE == 0:
            yield
        if name != last and name not in without:
            into.append(name)
        last = name
