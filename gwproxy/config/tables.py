"""The shape of the file: each table with its keys, their types, checks and defaults.

Rule of the room: a key is written down once, here; what two keys mean together, the reader knows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from decimal import Decimal
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Final, get_type_hints

from gwproxy.config import addresses, chains, parsers, secrets
from gwproxy.config.problems import Wrong
from gwproxy.config.values import Listen, Parse, Secret
from gwproxy.core.money import Nanos, parse_usd
from gwproxy.core.routing import COMPAT, OPENAI, REST
from gwproxy.core.upstream_words import MANAGEMENT_ROOT

_DAY_S = 86_400
_DEFAULT_LISTEN = Listen("tcp", host="127.0.0.1", port=8080)
_DEFAULT_OUTAGE_LIMIT = parse_usd(5)
_FLAVOUR = parsers.one_of(COMPAT, REST, OPENAI)
_ACCOUNT = secrets.identifier(
    r"[A-Za-z0-9_-]{1,64}",
    "copy it from Cloudflare's dashboard: at most 64 letters, digits, _ and -",
)
_GATEWAY = secrets.identifier(
    r"(?=.{1,64}\Z)[a-z0-9_]+(?:-[a-z0-9_]+)*",
    "write at most 64 of a-z, 0-9, _ and single dashes between them",
)
_PREFIX = parsers.matching(
    r"(?:[A-Za-z0-9@](?:[A-Za-z0-9@._/-]{0,126}[A-Za-z0-9_.-])?)?",
    'write what stands before the slash, as in "google-ai-studio"',
)
_MODEL = parsers.matching(r"[\x21-\x7e]{1,256}", "write the model's id without spaces")


# Each key: its type, the check of what is written, the default.


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """[server]: the public listener."""

    listen: Annotated[Listen, addresses.listen] = _DEFAULT_LISTEN
    drain_s: Annotated[float, parsers.seconds("0", 3600)] = 30.0
    chat_alias: Annotated[bool, parsers.flag] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Admin:
    """[admin]: `key` is None when the bootstrap key is off, `listen` when /admin is shared."""

    key: Annotated[Secret | None, secrets.admin_key] = None
    listen: Annotated[Listen | None, addresses.listen] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Upstream:
    """[upstream]: `root` is what the flavour's paths are appended to, worked out from the rest."""

    root: str
    flavour: Annotated[str, _FLAVOUR] = "cloudflare-compat"
    account_id: Annotated[str | None, _ACCOUNT] = None
    gateway_id: Annotated[str | None, _GATEWAY] = None
    token: Annotated[Secret | None, secrets.token] = None
    base_url: Annotated[str | None, addresses.base_url] = None
    first_byte_timeout_s: Annotated[float, parsers.seconds("0.001", 3600)] = 60.0
    answer_timeout_s: Annotated[float, parsers.seconds("0.001", _DAY_S)] = 600.0
    idle_timeout_s: Annotated[float, parsers.seconds("0.001", 3600)] = 120.0
    early_commit_s: Annotated[float, parsers.seconds("0", 3600)] = 0.0
    connect_timeout_s: Annotated[float, parsers.seconds("0.001", 300)] = 5.0
    idle_connection_s: Annotated[float, parsers.seconds("0", 3600)] = 55.0
    ca_file: Annotated[Path | None, parsers.existing_file] = None
    total_timeout_s: Annotated[float, parsers.seconds("0.001", _DAY_S)] = 900.0
    retries: Annotated[int, parsers.whole(0, 10)] = 0
    rpm_ceiling: Annotated[int | None, parsers.whole(1, 100_000_000)] = None
    api_url: Annotated[str, addresses.base_url] = MANAGEMENT_ROOT
    api_token: Annotated[Secret | None, secrets.optional_token] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """[providers.NAME]. `flavour`, `root` and `token` are what holds for this provider, inherited
    from [upstream] where its own table is silent; the rest is as written."""

    name: str
    root: str
    prefix: Annotated[str | None, _PREFIX] = None
    model: Annotated[str | None, _MODEL] = None
    rpm: Annotated[int | None, parsers.whole(1, 100_000_000)] = None
    daily_usd: Annotated[Nanos | None, parsers.usd] = None
    base_url: Annotated[str | None, addresses.base_url] = None
    flavour: Annotated[str, _FLAVOUR] = "cloudflare-compat"
    token: Annotated[Secret | None, secrets.token] = None
    max_tokens_field: Annotated[
        str | None, parsers.one_of("max_tokens", "max_completion_tokens")
    ] = None


@dataclass(frozen=True, slots=True)
class ChainEntry:
    """One candidate: a provider's name, the model it serves here, its share in the draw."""

    provider: str
    model: str
    weight: int = 0


@dataclass(frozen=True, slots=True)
class Model:
    """[models.ALIAS]: the candidates of one model name, in order."""

    name: str
    chain: tuple[ChainEntry, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _ModelTable:
    chain: Annotated[tuple[chains.Link | Wrong, ...], chains.chain]


@dataclass(frozen=True, slots=True, kw_only=True)
class Breaker:
    """[breaker]: when a provider is left alone, and for how long."""

    failure_threshold: Annotated[int, parsers.whole(1, 1000)] = 3
    success_threshold: Annotated[int, parsers.whole(1, 1000)] = 2
    open_timeout_ms: Annotated[int, parsers.whole(1, 1000 * _DAY_S)] = 60_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """[quota]: what is assumed where a caller says nothing, and who hears that money runs out."""

    default_max_output_tokens: Annotated[int, parsers.whole(1, 10_000_000)] = 4096
    alert_webhook: Annotated[Secret | None, secrets.webhook] = None
    alert_webhook_secret: Annotated[Secret | None, secrets.token] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """[failure]: what organizations get, unless they say otherwise, while the database is lost."""

    mode: Annotated[str, parsers.one_of("open", "closed")] = "closed"
    fallback_daily_limit_usd: Annotated[Nanos, parsers.usd] = _DEFAULT_OUTAGE_LIMIT


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """[prices.models."x/y"]: USD per million tokens, exactly as written; None: as `input`."""

    input: Annotated[Decimal, parsers.rate]
    output: Annotated[Decimal, parsers.rate]
    cache_read: Annotated[Decimal | None, parsers.rate] = None
    cache_write: Annotated[Decimal | None, parsers.rate] = None
    max_output_tokens: Annotated[int | None, parsers.whole(1, 10_000_000)] = None
    reasons: Annotated[bool, parsers.flag] = False

    def row(self) -> dict[str, object]:
        """What is written, as the price book takes it."""
        written = ((item.name, getattr(self, item.name)) for item in fields(self))
        return {name: value for name, value in written if value is not None}


@dataclass(frozen=True, slots=True)
class Prices:
    """[prices]: what wins over the compiled table, by "provider/model"."""

    models: Mapping[str, Price]


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """[storage]: absolute paths once loaded."""

    path: Annotated[Path, parsers.state_path] = Path("gwproxy.db")
    journal: Annotated[Path, parsers.state_path] = Path("journal")
    synchronous: Annotated[str, parsers.one_of("normal", "full")] = "normal"
    journal_segment_bytes: Annotated[int, parsers.whole(1 << 20, 1 << 30)] = 64 << 20
    journal_max_bytes: Annotated[int, parsers.whole(4 << 20, 1 << 40)] = 1 << 30
    backup_every_h: Annotated[int, parsers.whole(0, 8760)] = 24
    keep_months: Annotated[int, parsers.whole(0, 1200)] = 13
    keep_backups: Annotated[int, parsers.whole(1, 1000)] = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """[log]"""

    level: Annotated[str, parsers.one_of("debug", "info", "warning", "error")] = "info"


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """[metrics]: `open` lets anybody who reaches a shared listener read /metrics."""

    open: Annotated[bool, parsers.flag] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """[limits]: what one client may take of this process."""

    max_body_bytes: Annotated[int, parsers.whole(1024, 1 << 30)] = 16_777_216
    max_header_bytes: Annotated[int, parsers.whole(4096, 1 << 20)] = 32_768
    header_timeout_s: Annotated[float, parsers.seconds("0.001", 3600)] = 10.0
    body_timeout_s: Annotated[float, parsers.seconds("0.001", 3600)] = 30.0
    keepalive_timeout_s: Annotated[float, parsers.seconds("0", 3600)] = 75.0
    max_connections: Annotated[int, parsers.whole(1, 1_000_000)] = 10_000


@dataclass(frozen=True, slots=True)
class Config:
    """The whole configuration. Attribute names are the names of the file's tables and keys."""

    file: Path | None
    server: Server
    admin: Admin
    upstream: Upstream
    providers: Mapping[str, Provider]
    models: Mapping[str, Model]
    breaker: Breaker
    quota: Quota
    failure: Failure
    prices: Prices
    storage: Storage
    log: Log
    metrics: Metrics
    limits: Limits
    warnings: tuple[str, ...] = ()
    """Lawful, yet probably not meant: printed by check-config, logged at start."""


# The shape of the file. A `*` stands for a name that the operator chooses.
TABLES: Final[Mapping[str, type]] = MappingProxyType(
    {
        "server": Server,
        "admin": Admin,
        "upstream": Upstream,
        "providers.*": Provider,
        "models.*": _ModelTable,
        "breaker": Breaker,
        "quota": Quota,
        "failure": Failure,
        "prices.models.*": Price,
        "storage": Storage,
        "log": Log,
        "metrics": Metrics,
        "limits": Limits,
    }
)


# What is worked out (a provider's name, a root) has no parser, and so cannot be written.
PARSERS: Final[Mapping[str, Mapping[str, Parse[Any]]]] = MappingProxyType(
    {
        table: {
            name: hint.__metadata__[0]
            for name, hint in get_type_hints(kind, include_extras=True).items()
            if hasattr(hint, "__metadata__")
        }
        for table, kind in TABLES.items()
    }
)


def keys_of(table: str) -> tuple[str, ...]:
    """The keys that may be written in a table; `table` is a key of TABLES."""
    return tuple(PARSERS[table])


def home_of(key: str) -> str | None:
    """The table in which a misplaced key would be right."""
    homes = [table for table in TABLES if key in keys_of(table)]
    return homes[0].replace("*", "NAME") if len(homes) == 1 else None
