"""Imports: many changes of the directory as one. Checked against what is in force, built beside it,
recorded as one line of the journal, and put in force in the same step.

Nothing here stops a stream: rows go by in slices, the disk is waited for in a thread. What somebody
else changes meanwhile stays; where it is a row of the import's own, the import is refused.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from typing import Any, Final, TypeVar

from gwproxy.core.errors import Conflict, StorageUnavailable
from gwproxy.core.identity import DEFAULT_ORG_ID, Below, Organization, User, mint_id
from gwproxy.core.records import Import
from gwproxy.state.directory import Author
from gwproxy.state.keyring import Change, Keyring
from gwproxy.state.ledger import RETRY_AFTER_S, Ledger
from gwproxy.storage import imports

Row = TypeVar("Row", Organization, User)


_LET_GO: Final = 2_000
"""Rows at a time: half a millisecond."""


class Result(StrEnum):
    CREATED = "created"
    UPDATED = "updated"
    UNCHANGED = "unchanged"


class Unfit(Exception):
    """A row that cannot be imported. The message says why, in words for its sender."""


class Draft:
    """The rows of an import, each decided on what is in force and on the rows before it."""

    def __init__(self, keyring: Keyring, below: Below, now_s: int) -> None:
        self.organizations: dict[str, Organization] = {}
        """Those that are new or changed; and so with the users."""
        self.users: dict[str, User] = {}
        self.emails: dict[str, str] = {}
        self._keyring = keyring
        self._below = below
        self._now_s = now_s
        self._seen: dict[str, set[str]] = {"organization": set(), "user": set()}

    def put_organization(
        self, org_id: str | None, fields: Mapping[str, Any], created_at: int | None
    ) -> tuple[Result, str]:
        """What comes of a row, and its id. Unfit."""
        if org_id is None:
            raise Unfit("An organization needs an `org_id` here: it is how it is found again.")
        self._once("organization", org_id)
        before = self._keyring.organization(org_id)
        if before is None:
            created = self._created(created_at)
            row = Organization(org_id=org_id, **fields, created_at=created)
            self.organizations[org_id] = row
            return Result.CREATED, org_id
        if before.deleted_at is not None:
            raise Unfit("An organization with this id was deleted, and ids are not used again.")
        return self._change(before, fields, self.organizations, org_id), org_id

    def put_user(
        self, user_id: str | None, fields: Mapping[str, Any], created_at: int | None
    ) -> tuple[Result, str]:
        email = fields.get("email")
        holder = None if email is None else self._keyring.user_with_email(email)
        if user_id is None and holder is not None:
            user_id = holder.user_id
        if user_id is None and email is None:
            raise Unfit(
                "A user needs a `user_id` or an `email` here: it is how one is found again."
            )
        if email is not None:
            if holder is not None and holder.user_id != user_id:
                raise Unfit("There is a user with this e-mail address.")
            if email.lower() in self.emails:
                raise Unfit("This e-mail address is in the file twice.")
        org_id = fields.get("org_id")
        if org_id is not None:
            self._check_organization(org_id)
        if user_id is not None:
            self._once("user", user_id)
        before = None if user_id is None else self._keyring.user(user_id)
        if before is not None and before.deleted_at is not None:
            raise Unfit("A user with this id was deleted, and ids are not used again.")
        if email is not None:
            self.emails[email.lower()] = user_id or ""
        if before is not None:
            return self._change(before, fields, self.users, before.user_id), before.user_id
        if org_id is None:
            self._check_organization(DEFAULT_ORG_ID)
        user_id = user_id or mint_id("user", self._below)
        self.users[user_id] = User(user_id=user_id, **fields, created_at=self._created(created_at))
        return Result.CREATED, user_id

    def _change(
        self, before: Row, fields: Mapping[str, Any], into: dict[str, Row], name: str
    ) -> Result:
        if all(getattr(before, field) == value for field, value in fields.items()):
            return Result.UNCHANGED
        into[name] = replace(before, **fields, version=before.version + 1)
        return Result.UPDATED

    def _once(self, noun: str, name: str) -> None:
        if name in self._seen[noun]:
            raise Unfit(f"This {noun} is in the file twice.")
        self._seen[noun].add(name)

    def _created(self, created_at: int | None) -> int:
        return self._now_s if created_at is None else min(created_at, self._now_s)

    def _check_organization(self, org_id: str) -> None:
        row = self.organizations.get(org_id) or self._keyring.organization(org_id)
        if row is None or row.deleted_at is not None:
            raise Unfit("There is no organization with this `org_id`, nor one in a line before.")

    def spoilt_by(self, changes: Iterable[Change]) -> str | None:
        """Which row was changed, or taken, while these were checked; None: none that matters."""
        for change in changes:
            match change:
                case Organization():
                    gone = change.deleted_at is not None
                    if change.org_id in self.organizations or (gone and self._uses(change.org_id)):
                        return f"organization {change.org_id}"
                case User():
                    email = (change.email or "").lower()
                    if change.user_id in self.users or email in self.emails:
                        return f"user {change.user_id}"
        return None

    def _uses(self, org_id: str) -> bool:
        return any(user.org_id == org_id for user in self.users.values())

    def rows(self) -> Iterator[Organization | User]:
        yield from self.organizations.values()
        yield from self.users.values()

    def let_go(self) -> Iterator[None]:
        """Forget it all, a slice each turn: to free a hundred thousand rows takes its time too."""
        for held in (self.users, self.organizations, self.emails):
            while held:
                for _ in range(min(_LET_GO, len(held))):
                    held.popitem()
                yield
        for seen in self._seen.values():
            while seen:
                for _ in range(min(_LET_GO, len(seen))):
                    seen.pop()
                yield


class Imports:
    def __init__(
        self,
        ledger: Ledger,
        keyring: Keyring,
        below: Below,
        durable: Callable[[int], Awaitable[None]],
    ) -> None:
        self._ledger = ledger
        self._keyring = keyring
        self._below = below
        self._durable = durable
        self.under_way: Draft | None = None
        self._meanwhile: list[Change] = []

    @contextmanager
    def draft(self) -> Iterator[Draft]:
        """For the rows of one import: there is one at a time, else Conflict."""
        if self.under_way is not None:
            raise Conflict("Another import is under way: send this one when it is done.")
        draft = Draft(self._keyring, self._below, self._ledger.now_ms() // 1000)
        self.under_way = draft
        try:
            with self._keyring.watch() as self._meanwhile:
                yield draft
        finally:
            self.under_way = None

    async def commit(self, draft: Draft, by: Author) -> None:
        """Put all of it in force, and nothing of it where this raises: Conflict, or
        StorageUnavailable."""
        ledger, keyring = self._ledger, self._keyring
        if not draft.organizations and not draft.users:
            return
        name = imports.name_after(ledger.state.lsn)
        for _ in keyring.prepare(draft.organizations, draft.users, name):
            await asyncio.sleep(0)
        journal = ledger.journal
        try:
            digest, count = await asyncio.to_thread(
                imports.write, journal.files, journal.directory, name, draft.rows()
            )
        except OSError as error:
            raise StorageUnavailable(_NO_FILE, retry_after_s=RETRY_AFTER_S) from error
        # From here to the record nobody else gets a turn.
        spoilt = draft.spoilt_by(self._meanwhile)
        if spoilt is not None:
            raise Conflict(
                f"Somebody has changed {spoilt} meanwhile: nothing was imported. Send it again."
            )
        ledger.admit()
        ledger.post(
            Import(
                **ledger.stamp(),
                actor=by.actor,
                address=by.address,
                request_id=by.request_id,
                file=name,
                digest=digest,
                rows=count,
            )
        )
        await self._durable(ledger.state.lsn)


_NO_FILE: Final = "The import's rows could not be written beside the journal: nothing was imported."


def put_in_force(
    keyring: Keyring, record: Import, rows: Callable[[], Iterable[Organization | User]]
) -> None:
    """What the record of an import does to memory: at once where it was prepared, else from its
    file, as at a start."""
    prepared = keyring.prepared
    if prepared is not None and prepared.file == record.file:
        keyring.take(prepared)
    else:
        put_all(keyring, rows())


def put_all(keyring: Keyring, rows: Iterable[Organization | User]) -> None:
    """Many rows in one go: where nobody is served yet."""
    organizations: dict[str, Organization] = {}
    users: dict[str, User] = {}
    for row in rows:
        if isinstance(row, Organization):
            organizations[row.org_id] = row
        else:
            users[row.user_id] = row
    for _ in keyring.prepare(organizations, users, ""):
        pass
    prepared, keyring.prepared = keyring.prepared, None
    assert prepared is not None, "it was prepared"
    keyring.take(prepared)
