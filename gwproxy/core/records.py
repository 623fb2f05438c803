"""The journal's vocabulary: each change of the ledger's state as one record, and its JSON line.

Pure. A record carries all that `core.ledger.apply` needs, so that replay never asks a clock, a
price book or a directory. Short names where a line is written for each request.
"""

from typing import Final

import msgspec

from gwproxy.core.identity import AdminKey, ApiKey, Organization, User

Tokens = tuple[int, int, int, int, int]
"""Fresh input, cache reads, cache writes, output, and the reasoning that is part of the output."""

NO_TOKENS: Final[Tokens] = (0, 0, 0, 0, 0)


Rates = tuple[int, int, int, int]
"""Pico-USD for each token: fresh input, cache reads, cache writes, output."""


class Held(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What one reservation holds on one account, with the decision's own figures beside it."""

    account: str
    """`key:ID`, `user:ID`, `org:ID`, `provider:NAME` or `outage:ORG`."""
    period: str
    """`2026-11` or `2026-11-21`, UTC."""
    hold: int
    """Nano-USD."""
    limit: int | None
    """The account's limit with its grants at that moment; None: it had none."""
    total: int
    """Spent and held on the account, this hold included."""


class Tried(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One attempt, as the receipt shows it."""

    provider: str
    model: str
    status: int | None
    error_type: str
    reason: str
    duration_ms: int
    cost: int


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="k"):
    """What every record has. `t` is ledger time in milliseconds since 1970, `synced` the last LSN
    that was known to be on the disk when this one was written."""

    lsn: int
    t: int
    synced: int


class Reserve(Record, frozen=True, kw_only=True, omit_defaults=True, gc=False, tag="reserve"):
    """A request is admitted. Its LSN is the reservation's name from here on."""

    id: str
    model: str = msgspec.field(name="m")
    """As the caller named it."""
    provider: str = msgspec.field(name="p")
    upstream_model: str = msgspec.field(name="um")
    prices: str = msgspec.field(name="v")
    """The price book's version."""
    holds: tuple[Held, ...]
    """Of the key, the user, the organization, and then the others."""
    prompt: int = 0
    """Input tokens that the hold allows for."""
    max: int | None = None
    """Output tokens that the hold allows for, over all choices."""
    stream: bool = False
    hidden: bool = False
    """It may be billed for output that never shows: a watermark says nothing about it."""
    degraded: bool = False
    edits: tuple[str, ...] = ()
    """What was changed of the request before it was sent on."""

    @property
    def key_id(self) -> str:
        return self.holds[0].account[4:]

    @property
    def user_id(self) -> str:
        return self.holds[1].account[5:]

    @property
    def org_id(self) -> str:
        return self.holds[2].account[4:]


class Mark(Record, frozen=True, kw_only=True, omit_defaults=True, gc=False, tag="mark"):
    """What has been relayed stays below this watermark: recovery charges it."""

    r: int
    tokens: int
    cost: int
    holds: tuple[Held, ...] = ()
    """All holds of the reservation as they stand from here on; empty: as they were."""


class Attempt(Record, frozen=True, kw_only=True, omit_defaults=True, gc=False, tag="attempt"):
    """The attempt before is closed and the next one, `n`, begins."""

    r: int
    n: int
    provider: str = msgspec.field(name="p")
    upstream_model: str = msgspec.field(name="um")
    cost: int
    """Nano-USD that the attempts before may have cost."""
    why: str
    holds: tuple[Held, ...]
    hidden: bool = False


class Settle(Record, frozen=True, kw_only=True, omit_defaults=True, gc=False, tag="settle"):
    """The one end of a reservation: its cost is posted, its holds are released."""

    r: int
    cost: int
    tokens: Tokens
    source: str
    outcome: str
    attempts: tuple[Tried, ...] = ()
    overrun: int = 0
    status: int = 0
    """What the client was answered; 0: unknown."""
    log_id: str = ""
    """The upstream's own name for its log line."""
    rates: Rates | None = None
    """What the tokens were multiplied with; None: more than one attempt had a cost, or none."""
    notes: tuple[str, ...] = ()
    """What else has to be said of how it was served, such as who was passed over."""


class Adjust(Record, frozen=True, kw_only=True, omit_defaults=True, tag="adjust"):
    """A correction of balances that no request of its own stands behind."""

    accounts: tuple[tuple[str, str], ...]
    """(account, period) of each."""
    delta: int
    """Nano-USD added to what each has spent; of a grant, to what each may spend."""
    type: str
    """`credit`, `grant`, `reset`, `rerate`, `reconcile` or `late`."""
    actor: str
    reason: str
    r: int | None = None
    address: str = ""
    request_id: str = ""
    idempotency_key: str | None = None
    tokens: Tokens | None = None


class Close(Record, frozen=True, kw_only=True, omit_defaults=True, tag="close"):
    """The entries of an account's period went into the archive; this is what remains of them."""

    account: str
    period: str
    spent: int
    credited: int
    count: int
    hash: str


class Admin(Record, frozen=True, kw_only=True, omit_defaults=True, tag="admin"):
    """A change of the directory: the whole row as it stands afterwards, and who asked for it."""

    action: str
    org: Organization | None = None
    user: User | None = None
    key: ApiKey | None = None
    admin_key: AdminKey | None = None
    actor: str = ""
    address: str = ""
    request_id: str = ""
    idempotency_key: str | None = None

    @property
    def row(self) -> Organization | User | ApiKey | AdminKey:
        row = self.org or self.user or self.key or self.admin_key
        assert row is not None, "an admin record has a row"
        return row


class Import(Record, frozen=True, kw_only=True, omit_defaults=True, tag="import"):
    """Many changes of the directory at once. Their rows stand in a file beside the journal, which
    was on the disk before this was written."""

    file: str
    digest: str
    """The file's SHA-256."""
    rows: int
    actor: str = ""
    address: str = ""
    request_id: str = ""


class Breaker(Record, frozen=True, kw_only=True, omit_defaults=True, tag="breaker"):
    """A provider's circuit breaker changed its state."""

    provider: str
    before: str
    after: str
    until: int = 0
    """When an open one is due to be tried again, in milliseconds since 1970."""
    why: str = ""
    actor: str = ""
    """Who has done it; empty: it came about by itself."""
    address: str = ""
    request_id: str = ""


class Alert(Record, frozen=True, kw_only=True, omit_defaults=True, tag="alert"):
    """An account has spent this much of its limit, for the first time in this period."""

    account: str
    period: str
    percent: int
    spent: int
    limit: int


class Storage(Record, frozen=True, kw_only=True, omit_defaults=True, tag="storage"):
    """The database was lost, or came back."""

    part: str
    state: str
    cause: str = ""


class Stop(Record, frozen=True, kw_only=True, omit_defaults=True, tag="stop"):
    """The process ended in order: nothing is missing after this line."""


AnyRecord = (
    Reserve
    | Mark
    | Attempt
    | Settle
    | Adjust
    | Close
    | Admin
    | Import
    | Breaker
    | Alert
    | Storage
    | Stop
)

encode = msgspec.json.Encoder().encode
"""A record as the payload of its line."""

_decoder: msgspec.json.Decoder[AnyRecord] = msgspec.json.Decoder(AnyRecord)


def decode(payload: bytes) -> AnyRecord:
    """The record of a line; ValueError for what is none."""
    return _decoder.decode(payload)
