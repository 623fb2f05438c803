"""Who calls: the grammar of keys and ids, and organizations, users and keys as values.

Pure: randomness and time come in as arguments, nothing is looked up here.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import sha256
from typing import Final
from zlib import crc32

from gwproxy.core.money import Nanos

ALPHABET: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
PUBLIC_CHARS: Final = 8
SECRET_CHARS: Final = 32  # 32 Base62 characters are 190 bits: nobody guesses, nobody collides
CHECKSUM_CHARS: Final = 6

MAX_KEY_CHARS: Final = 200
"""Longer credentials are refused unread, so that nobody makes us hash megabytes for nothing."""

Below = Callable[[int], int]
"""A source of randomness: `below(n)` is an integer from 0 to n - 1, as of `secrets.randbelow`."""


class KeyKind(StrEnum):
    LIVE = "live"
    TEST = "test"
    ADMIN = "admin"


# -- keys ----------------------------------------------------------------------------------------

_KEY = re.compile(r"gw_(live|test|admin)_([0-9A-Za-z]{8})([0-9A-Za-z]{32})([0-9A-Za-z]{6})")

_PAIRS: Final = tuple(high + low for high in ALPHABET for low in ALPHABET)


@dataclass(frozen=True, slots=True)
class KeyText:
    """The parts of a key that may be shown. The secret is not among them."""

    kind: KeyKind
    public: str

    @property
    def key_id(self) -> str:
        return f"{'admin' if self.kind is KeyKind.ADMIN else 'key'}_{self.public}"

    @property
    def prefix(self) -> str:
        """What a person recognises a key by, in lists and in logs."""
        return f"gw_{self.kind}_{self.public}"


def mint(kind: KeyKind, below: Below, public: str | None = None) -> str:
    """A new key: `gw_live_`, 8 public characters, 32 secret ones, 6 of checksum.

    `public`: those of a key that gets a new secret; it stays the same key.
    """
    if public is None:
        public = _letters(PUBLIC_CHARS, below)
    unchecked = f"gw_{kind}_{public}{_letters(SECRET_CHARS, below)}"
    return unchecked + checksum(unchecked)


def _letters(count: int, below: Below) -> str:
    return "".join(ALPHABET[below(62)] for _ in range(count))


def mint_id(noun: str, below: Below) -> str:
    """An id for somebody who came without one, such as `user_5kX0bTq9ZrAa`."""
    return f"{noun}_{_letters(12, below)}"


def checksum(text: str) -> str:
    """CRC-32 of `text` as six Base62 digits: a slip of the hand is seen without a look-up."""
    # Two digits (62 squared) at a time: this stands on the path of every request.
    rest, low = divmod(crc32(text.encode("ascii")), 3844)
    high, middle = divmod(rest, 3844)
    return _PAIRS[high] + _PAIRS[middle] + _PAIRS[low]


def well_formed(text: str) -> bool:
    """Whether `text` has the shape and the checksum of a key: said without knowing any key."""
    return (
        len(text) <= MAX_KEY_CHARS
        and _KEY.fullmatch(text) is not None
        and text[-CHECKSUM_CHARS:] == checksum(text[:-CHECKSUM_CHARS])
    )


def parse(text: str) -> KeyText:
    """The public parts of a key, or a ValueError whose words say what is wrong with it."""
    if len(text) > MAX_KEY_CHARS:
        raise ValueError(f"longer than {MAX_KEY_CHARS} characters: this is not a key")
    match = _KEY.fullmatch(text)
    if match is None:
        raise ValueError(
            "not the shape of a key: gw_live_, gw_test_ or gw_admin_ and 46 letters and digits"
        )
    if match[4] != checksum(text[:-CHECKSUM_CHARS]):
        raise ValueError("the checksum does not match: a character was changed, lost or swapped")
    return KeyText(KeyKind(match[1]), match[2])


def digest(key: str) -> bytes:
    """What is stored in a key's place. A key of 190 random bits needs no salt and no slow hash."""
    return sha256(key.encode("utf-8", "surrogateescape")).digest()


# -- ids -----------------------------------------------------------------------------------------

_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


def is_id(text: str) -> bool:
    """ASCII only: an id goes into log lines, URLs and headers, and must look like nothing else."""
    return _ID.fullmatch(text) is not None


# -- the directory's values ----------------------------------------------------------------------


class Status(StrEnum):
    ACTIVE = "active"
    SUSPENDED = "suspended"


class Scope(StrEnum):
    """What an admin key opens."""

    READ = "read"
    WRITE = "write"  # and reads as well


class FailureMode(StrEnum):
    """What an organization gets while the database is lost."""

    OPEN = "open"
    CLOSED = "closed"


class UnboundedPolicy(StrEnum):
    """What is held for a request that declares no maximum."""

    CLAMP = "clamp"
    STRICT = "strict"
    BOUNDED = "bounded"


class OnExhausted(StrEnum):
    """What becomes of a stream whose hold cannot grow any more."""

    CUT = "cut"
    FINISH = "finish"


class OnClientGone(StrEnum):
    """Whether an answer that nobody waits for is closed at once or read to its usage."""

    CLOSE = "close"
    DRAIN = "drain"


DEFAULT_ORG_ID: Final = "default"
"""Users without an organization belong to this one; it is there from the first start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Organization:
    """None in a limit means no limit, where no comment says otherwise. Times are Unix seconds."""

    org_id: str
    name: str | None = None
    status: Status = Status.ACTIVE
    monthly_budget: Nanos | None = None
    failure_mode: FailureMode | None = None  # None: as configured for all
    fallback_daily_limit: Nanos | None = None  # None: as configured for all, never unlimited
    allowed_features: tuple[str, ...] = ()
    prices: Mapping[str, Mapping[str, str]] | None = None  # USD per million tokens, by model
    unbounded_policy: UnboundedPolicy = UnboundedPolicy.CLAMP
    on_exhausted: OnExhausted = OnExhausted.CUT
    on_client_gone: OnClientGone = OnClientGone.CLOSE
    cache: bool = False
    created_at: int
    deleted_at: int | None = None
    version: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    user_id: str
    org_id: str = DEFAULT_ORG_ID
    email: str | None = None
    status: Status = Status.ACTIVE
    monthly_limit: Nanos | None = None
    rpm: int | None = None
    tpm: int | None = None
    max_parallel: int | None = None
    created_at: int
    deleted_at: int | None = None
    version: int = 1


@dataclass(frozen=True, slots=True)
class OldSecret:
    """One that a key had before its rotation, and the second from which it is refused."""

    digest: bytes
    until: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    key_id: str
    user_id: str
    prefix: str
    digest: bytes
    previous: tuple[OldSecret, ...] = ()
    name: str | None = None
    allowed_models: tuple[str, ...] | None = None  # None: every model
    monthly_limit: Nanos | None = None
    rpm: int | None = None
    tpm: int | None = None
    max_parallel: int | None = None
    created_at: int
    expires_at: int | None = None
    revoked_at: int | None = None
    last_used_at: int | None = None  # this and the next two as last stored: memory knows better
    last_used_from: str | None = None
    use_count: int = 0
    version: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class AdminKey:
    """It opens the admin plane, and nothing else."""

    key_id: str
    prefix: str
    digest: bytes
    name: str | None = None
    scope: Scope
    created_at: int
    expires_at: int | None = None
    revoked_at: int | None = None
    last_used_at: int | None = None  # this and the next two as of an ApiKey
    last_used_from: str | None = None
    use_count: int = 0
    version: int = 1


@dataclass(frozen=True, slots=True)
class Principal:
    """The caller of one request, known by the key alone."""

    key_id: str
    user_id: str
    org_id: str
    key_name: str | None
    allowed_models: tuple[str, ...] | None
    accounts: tuple[str, str, str] = field(init=False, repr=False, compare=False)
    """The names of the accounts that each of his requests is charged to."""

    def __post_init__(self) -> None:
        names = (f"key:{self.key_id}", f"user:{self.user_id}", f"org:{self.org_id}")
        object.__setattr__(self, "accounts", names)
