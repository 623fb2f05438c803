"""The configuration: config.toml and the environment, read once into frozen values.

Rule of the room: every value is checked here, so that nobody checks it again later; all that is
wrong is told at once, each with its file, its key and the cure; a secret is never shown.

Which source wins, from strong to weak: `GWPROXY__TABLE__KEY` in the environment, the three
`CIRCUIT_BREAKER_*` variables, the file, the default that stands beside each key below.
"""

import difflib
import hmac
import ipaddress
import re
import stat
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from decimal import Decimal, InvalidOperation
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal, TypeVar, cast, get_type_hints
from urllib.parse import urlsplit

from gwproxy.core.money import Nanos, parse_rate, parse_usd
from gwproxy.core.routing import COMPAT, OPENAI, REST
from gwproxy.core.upstream_words import COMPAT_ROOT, MANAGEMENT_ROOT, REST_ROOT

T = TypeVar("T")

CONFIG_PATHS: Final = (Path("config.toml"), Path("/etc/gwproxy/config.toml"))

# Each of the three facts about a Cloudflare gateway is known under two names.
FAMILIES: Final[Mapping[str, tuple[str, str]]] = MappingProxyType(
    {
        "account_id": ("CLOUDFLARE_ACCOUNT_ID", "AI_GATEWAY_ACCOUNT_ID"),
        "gateway_id": ("CLOUDFLARE_GATEWAY_ID", "AI_GATEWAY_ID"),
        "token": ("CLOUDFLARE_API_TOKEN", "AI_GATEWAY_TOKEN"),
    }
)
BREAKER_VARIABLES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "CIRCUIT_BREAKER_FAILURE_THRESHOLD": "failure_threshold",
        "CIRCUIT_BREAKER_SUCCESS_THRESHOLD": "success_threshold",
        "CIRCUIT_BREAKER_OPEN_TIMEOUT": "open_timeout_ms",
    }
)
DEFAULT_FALLBACKS: Final = "gemini,huggingface,anthropic"

ADMIN_KEY_MIN_CHARS: Final = 32
FILE_LIMIT_BYTES: Final = 1 << 20
SECRET_LIMIT_BYTES: Final = 1 << 16
CHAIN_LIMIT: Final = 32


# -- what can go wrong ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing to correct: `file` is a path or "environment", `key` dotted or a variable."""

    file: str
    key: str
    what: str
    cure: str

    def __str__(self) -> str:
        place = f"{self.file}: {self.key}" if self.key else self.file
        return f"{place}: {self.what}; {self.cure}"


class ConfigError(Exception):
    """The configuration cannot be used. `problems` has all of them, `str()` one on each line."""

    def __init__(self, *problems: Problem) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems


class _Wrong(Exception):
    """Raised by a parser about its value alone; the reader adds the file and the key."""

    def __init__(self, what: str, cure: str) -> None:
        super().__init__(what)
        self.what = what
        self.cure = cure


class _Unset(_Wrong):
    """A secret's `env:NAME` whose variable is not set."""

    def __init__(self, variable: str) -> None:
        self.variable = variable
        names = " (or ".join(_family(variable)) + (")" if len(_family(variable)) > 1 else "")
        super().__init__(
            f"the environment variable {names} is not set",
            "set it, or write the secret as file:/path or credential:NAME",
        )


# -- small values --------------------------------------------------------------------------------


class Secret:
    """A token or key. Printing, formatting or logging it shows stars; only `reveal()` tells it."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        return self._value

    def __repr__(self) -> str:
        return "Secret(***)"

    def __str__(self) -> str:
        return "***"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        return hmac.compare_digest(self._value.encode(), other._value.encode())

    def __hash__(self) -> int:
        return hash(self._value)

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("a secret is not pickled: it would leave the process unseen")


@dataclass(frozen=True, slots=True)
class Listen:
    """Where a listener waits: `tcp` has host and port, `unix` a path, `fd` an inherited socket."""

    kind: Literal["tcp", "unix", "fd"]
    host: str = ""
    port: int = 0
    path: str = ""
    fd: int = -1

    def __str__(self) -> str:
        if self.kind == "unix":
            return f"unix:{self.path}"
        if self.kind == "fd":
            return f"fd:{self.fd}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


# -- one value from one place --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Place:
    """What a parser may ask about the world: the environment and the folders of relative paths."""

    environ: Mapping[str, str]
    folder: Path
    """Of the configuration file: secrets' files and certificates are named from here."""
    state_folder: Path
    """Of databases and journals."""


@dataclass(frozen=True, slots=True)
class _Raw:
    """A value as it was found: of any TOML type from the file, always text from the environment."""

    value: object
    variable: str | None
    place: _Place

    def text(self) -> str:
        if not isinstance(self.value, str):
            raise _Wrong(f"must be text, not {_kind(self.value)}", "put it in quotes")
        return self.value


Parse = Callable[[_Raw], T]


def _flag(raw: _Raw) -> bool:
    if raw.variable is not None and raw.text().lower() in ("true", "false"):
        return raw.text().lower() == "true"
    if isinstance(raw.value, bool):
        return raw.value
    raise _Wrong(f"must be true or false, not {_show(raw.value)}", "write true or false, no quotes")


def _whole(low: int, high: int) -> Parse[int]:
    def parse(raw: _Raw) -> int:
        value = raw.value
        # Bounded in length because Python refuses to convert very long numerals.
        if raw.variable is not None and re.fullmatch(r"[+-]?[0-9]{1,18}", raw.text()):
            value = int(raw.text())
        if not isinstance(value, int) or isinstance(value, bool):
            raise _Wrong(f"must be a whole number, not {_show(value)}", _between(low, high))
        if not low <= value <= high:
            raise _Wrong(f"{_show(value)} is out of range", _between(low, high))
        return value

    return parse


def _seconds(low: str, high: int) -> Parse[float]:
    lowest = Decimal(low)

    def parse(raw: _Raw) -> float:
        value = _decimal(raw)
        if value is None or not value.is_finite():
            raise _Wrong(f"must be a number, not {_show(raw.value)}", _between(low, high))
        if not lowest <= value <= high:
            raise _Wrong(f"{_show(raw.value)} is out of range", _between(low, high))
        return float(value)

    return parse


def _usd(raw: _Raw) -> Nanos:
    value = raw.value
    if isinstance(value, bool) or not isinstance(value, str | int | Decimal):
        raise _Wrong(f"must be an amount, not {_kind(value)}", 'write USD such as "12.50"')
    try:
        return parse_usd(value.strip() if isinstance(value, str) else value)
    except ValueError as error:
        what = f"{_show(value)} is not an amount of money ({error})"
        raise _Wrong(what, 'write USD such as "12.50"') from None


def _rate(raw: _Raw) -> Decimal:
    cure = 'write USD per million tokens such as "0.15"'
    value = raw.value
    if isinstance(value, bool) or not isinstance(value, str | int | Decimal):
        raise _Wrong(f"must be a price, not {_kind(value)}", cure)
    try:
        text = value.strip() if isinstance(value, str) else value
        parse_rate(text)
        return Decimal(text)
    except (ValueError, InvalidOperation) as error:
        raise _Wrong(f"{_show(value)} is not a price ({error})", cure) from None


def _one_of(*choices: str) -> Parse[str]:
    listed = ", ".join(f'"{choice}"' for choice in choices)

    def parse(raw: _Raw) -> str:
        text = raw.text()
        if text not in choices:
            raise _Wrong(f"{_show(text)} is not known", f"write one of {listed}")
        return text

    return parse


_flavour = _one_of(COMPAT, REST, OPENAI)


def _matching(pattern: str, form: str) -> Parse[str]:
    compiled = re.compile(pattern)

    def parse(raw: _Raw) -> str:
        text = raw.text().strip()
        if not compiled.fullmatch(text):
            raise _Wrong(f"{_show(text)} has the wrong form", form)
        return text

    return parse


def _id(pattern: str, form: str) -> Parse[str]:
    """An id that is kept beside the token, in the same ways: and so it is not shown either, since
    whoever mixes up the two would find the token in an error message."""

    def parse(raw: _Raw) -> str:
        text = _dereference(raw).strip()
        if not re.fullmatch(pattern, text):
            raise _Wrong("does not look like an id", form)
        return text

    return parse


def _token(raw: _Raw) -> Secret:
    value = _dereference(raw).strip()
    if value.lower().startswith("bearer "):
        raise _Wrong('the token begins with "Bearer "', "write the token alone")
    # It is sent in a header: anything else could end the header or start another.
    if not re.fullmatch(r"[\x21-\x7e]{1,4096}", value):
        raise _Wrong(
            "the token is empty or has characters that no header can carry",
            "copy it again, without spaces and line breaks",
        )
    return Secret(value)


def _webhook(raw: _Raw) -> Secret:
    """An address, which often is a secret too, so that it is not shown."""
    value = _dereference(raw).strip()
    cure = 'write an address such as "https://hooks.example/alerts"'
    try:
        parts = urlsplit(value)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise _Wrong("is not an address", cure) from None
    if not host or port == 0 or not re.fullmatch(r"[\x21-\x7e]{1,2048}", value):
        raise _Wrong("is not an address", cure)
    if parts.scheme != "https" and not (parts.scheme == "http" and _is_loopback(value)):
        raise _Wrong("must begin with https:// (http:// to this machine alone)", cure)
    if parts.username is not None or parts.password is not None:
        raise _Wrong("has a user name or password in it", "use alert_webhook_secret")
    return Secret(value)


def _optional_token(raw: _Raw) -> Secret | None:
    """None where its variable is not set: what a person's commands use, a server does without."""
    try:
        return _token(raw)
    except _Unset:
        return None


def _admin_key(raw: _Raw) -> Secret | None:
    try:
        key = _token(raw)
    except _Unset as unset:
        if unset.variable == "GWPROXY_ADMIN_KEY":
            return None
        raise
    if len(key.reveal()) < ADMIN_KEY_MIN_CHARS:
        raise _Wrong(
            f"the admin key has fewer than {ADMIN_KEY_MIN_CHARS} characters",
            "make one with: openssl rand -hex 32",
        )
    return key


def _base_url(raw: _Raw) -> str:
    cure = 'write an address such as "https://gateway.example/v1"'
    text = raw.text().strip()
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise _Wrong("is not an address", cure) from None
    if parts.scheme not in ("http", "https"):
        raise _Wrong("must begin with http:// or https://", cure)
    if parts.username is not None or parts.password is not None:
        raise _Wrong("has a user name or password in it", "put the secret into `token`")
    if "?" in text or "#" in text:
        raise _Wrong("has a query or a fragment", "write the address up to the path")
    if not host or port == 0 or not re.fullmatch(r"[\x21-\x7e]+", text) or "\\" in text:
        raise _Wrong("is not an address", cure)
    text = text.rstrip("/")
    if text.endswith("/chat/completions"):
        raise _Wrong("ends in /chat/completions, which is appended", "write what stands before it")
    return text


def _listen(raw: _Raw) -> Listen:
    cure = 'write "127.0.0.1:8080", "[::1]:8080", "unix:/path" or "fd:3"'
    text = raw.text().strip()
    wrong = _Wrong(f"{_show(text)} is not an address to listen on", cure)
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        # The kernel's limit for the name of a socket is 108 bytes with the closing zero.
        if not path.startswith("/") or len(path.encode()) > 107 or "\0" in path:
            raise _Wrong(
                f"{_show(text)} is not a socket's path",
                'write an absolute path of at most 107 bytes, as in "unix:/run/gwproxy/gw.sock"',
            )
        return Listen("unix", path=path)
    if match := re.fullmatch(r"fd:([0-9]{1,4})", text):
        if int(match[1]) < 3:
            raise _Wrong(
                "file descriptors 0 to 2 are not sockets", 'inherited ones start at "fd:3"'
            )
        return Listen("fd", fd=int(match[1]))
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([A-Za-z0-9._-]+)):([0-9]{1,5})", text)
    if match is None:
        raise wrong
    if match[1] is not None:
        try:
            ipaddress.IPv6Address(match[1])
        except ValueError:
            raise wrong from None
    if int(match[3]) > 65535:
        raise _Wrong(f"port {match[3]} is out of range", _between(0, 65535))
    return Listen("tcp", host=match[1] or match[2], port=int(match[3]))


def _state_path(raw: _Raw) -> Path:
    return raw.place.state_folder / _path(raw)


def _existing_file(raw: _Raw) -> Path:
    path = raw.place.folder / _path(raw)
    if not path.is_file():
        raise _Wrong(f"there is no file {path}", "correct the path or leave the key out")
    return path


def _path(raw: _Raw) -> str:
    text = raw.text()
    if not text.strip() or "\0" in text:
        raise _Wrong("is not a path", "name a file or folder")
    return text


@dataclass(frozen=True, slots=True)
class _Link:
    """A chain's entry as it was written, before the providers are known."""

    provider: str
    model: str | None
    weight: int


def _chain(raw: _Raw) -> tuple[_Link, ...]:
    cure = 'write chain = ["gemini", { provider = "openai", model = "gpt-4o-mini", weight = 1 }]'
    entries = raw.value
    if raw.variable is not None:
        entries = _list_from_text(raw.text(), cure)
    if not isinstance(entries, list) or not entries:
        raise _Wrong("must be a list with at least one provider", cure)
    if len(entries) > CHAIN_LIMIT:
        raise _Wrong(f"has more than {CHAIN_LIMIT} entries", "shorten it")
    links: list[_Link] = []
    for number, entry in enumerate(entries, start=1):
        if isinstance(entry, str):
            entry = {"provider": entry}
        if not isinstance(entry, dict):
            raise _Wrong(f"entry {number} is {_kind(entry)}", cure)
        for key in entry.keys() - {"provider", "model", "weight"}:
            near = _nearest(key, ("provider", "model", "weight"))
            raise _Wrong(
                f"entry {number} has an unknown key {_show(key)}",
                f'did you mean "{near}"?' if near else "known are provider, model and weight",
            )
        provider, model = entry.get("provider"), entry.get("model")
        if not isinstance(provider, str) or not isinstance(model, str | None) or model == "":
            raise _Wrong(f"entry {number} needs a provider's name as text", cure)
        try:
            weight = _whole(0, 1_000_000)(_Raw(entry.get("weight", 0), None, raw.place))
        except _Wrong as wrong:
            raise _Wrong(f"entry {number}: weight {wrong.what}", wrong.cure) from None
        links.append(_Link(provider, model, weight))
    return tuple(links)


# -- the tables ----------------------------------------------------------------------------------

_DAY_S = 86_400
_DEFAULT_LISTEN = Listen("tcp", host="127.0.0.1", port=8080)
_DEFAULT_OUTAGE_LIMIT = parse_usd(5)
_ACCOUNT = _id(
    r"[A-Za-z0-9_-]{1,64}",
    "copy it from Cloudflare's dashboard: at most 64 letters, digits, _ and -",
)
_GATEWAY = _id(
    r"(?=.{1,64}\Z)[a-z0-9_]+(?:-[a-z0-9_]+)*",
    "write at most 64 of a-z, 0-9, _ and single dashes between them",
)
_PREFIX = _matching(
    r"(?:[A-Za-z0-9@](?:[A-Za-z0-9@._/-]{0,126}[A-Za-z0-9_.-])?)?",
    'write what stands before the slash, as in "google-ai-studio"',
)
_MODEL = _matching(r"[\x21-\x7e]{1,256}", "write the model's id without spaces")

# Each key: its type, the check of what is written, the default.


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """[server]: the public listener."""

    listen: Annotated[Listen, _listen] = _DEFAULT_LISTEN
    drain_s: Annotated[float, _seconds("0", 3600)] = 30.0
    chat_alias: Annotated[bool, _flag] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Admin:
    """[admin]: `key` is None when the bootstrap key is off, `listen` when /admin is shared."""

    key: Annotated[Secret | None, _admin_key] = None
    listen: Annotated[Listen | None, _listen] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Upstream:
    """[upstream]: `root` is what the flavour's paths are appended to, worked out from the rest."""

    root: str
    flavour: Annotated[str, _flavour] = "cloudflare-compat"
    account_id: Annotated[str | None, _ACCOUNT] = None
    gateway_id: Annotated[str | None, _GATEWAY] = None
    token: Annotated[Secret | None, _token] = None
    base_url: Annotated[str | None, _base_url] = None
    first_byte_timeout_s: Annotated[float, _seconds("0.001", 3600)] = 60.0
    answer_timeout_s: Annotated[float, _seconds("0.001", _DAY_S)] = 600.0
    idle_timeout_s: Annotated[float, _seconds("0.001", 3600)] = 120.0
    early_commit_s: Annotated[float, _seconds("0", 3600)] = 0.0
    connect_timeout_s: Annotated[float, _seconds("0.001", 300)] = 5.0
    idle_connection_s: Annotated[float, _seconds("0", 3600)] = 55.0
    ca_file: Annotated[Path | None, _existing_file] = None
    total_timeout_s: Annotated[float, _seconds("0.001", _DAY_S)] = 900.0
    retries: Annotated[int, _whole(0, 10)] = 0
    rpm_ceiling: Annotated[int | None, _whole(1, 100_000_000)] = None
    api_url: Annotated[str, _base_url] = MANAGEMENT_ROOT
    api_token: Annotated[Secret | None, _optional_token] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """[providers.NAME]. `flavour`, `root` and `token` are what holds for this provider, inherited
    from [upstream] where its own table is silent; the rest is as written."""

    name: str
    root: str
    prefix: Annotated[str | None, _PREFIX] = None
    model: Annotated[str | None, _MODEL] = None
    rpm: Annotated[int | None, _whole(1, 100_000_000)] = None
    daily_usd: Annotated[Nanos | None, _usd] = None
    base_url: Annotated[str | None, _base_url] = None
    flavour: Annotated[str, _flavour] = "cloudflare-compat"
    token: Annotated[Secret | None, _token] = None
    max_tokens_field: Annotated[str | None, _one_of("max_tokens", "max_completion_tokens")] = None


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
    chain: Annotated[tuple[_Link, ...], _chain]


@dataclass(frozen=True, slots=True, kw_only=True)
class Breaker:
    """[breaker]: when a provider is left alone, and for how long."""

    failure_threshold: Annotated[int, _whole(1, 1000)] = 3
    success_threshold: Annotated[int, _whole(1, 1000)] = 2
    open_timeout_ms: Annotated[int, _whole(1, 1000 * _DAY_S)] = 60_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """[quota]: what is assumed where a caller says nothing, and who hears that money runs out."""

    default_max_output_tokens: Annotated[int, _whole(1, 10_000_000)] = 4096
    alert_webhook: Annotated[Secret | None, _webhook] = None
    alert_webhook_secret: Annotated[Secret | None, _token] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """[failure]: what organizations get, unless they say otherwise, while the database is lost."""

    mode: Annotated[str, _one_of("open", "closed")] = "closed"
    fallback_daily_limit_usd: Annotated[Nanos, _usd] = _DEFAULT_OUTAGE_LIMIT


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """[prices.models."x/y"]: USD per million tokens, exactly as written; None: as `input`."""

    input: Annotated[Decimal, _rate]
    output: Annotated[Decimal, _rate]
    cache_read: Annotated[Decimal | None, _rate] = None
    cache_write: Annotated[Decimal | None, _rate] = None
    max_output_tokens: Annotated[int | None, _whole(1, 10_000_000)] = None
    reasons: Annotated[bool, _flag] = False

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

    path: Annotated[Path, _state_path] = Path("gwproxy.db")
    journal: Annotated[Path, _state_path] = Path("journal")
    synchronous: Annotated[str, _one_of("normal", "full")] = "normal"
    journal_segment_bytes: Annotated[int, _whole(1 << 20, 1 << 30)] = 64 << 20
    journal_max_bytes: Annotated[int, _whole(4 << 20, 1 << 40)] = 1 << 30
    backup_every_h: Annotated[int, _whole(0, 8760)] = 24
    keep_months: Annotated[int, _whole(0, 1200)] = 13
    keep_backups: Annotated[int, _whole(1, 1000)] = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """[log]"""

    level: Annotated[str, _one_of("debug", "info", "warning", "error")] = "info"


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """[metrics]: `open` lets anybody who reaches a shared listener read /metrics."""

    open: Annotated[bool, _flag] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """[limits]: what one client may take of this process."""

    max_body_bytes: Annotated[int, _whole(1024, 1 << 30)] = 16_777_216
    max_header_bytes: Annotated[int, _whole(4096, 1 << 20)] = 32_768
    header_timeout_s: Annotated[float, _seconds("0.001", 3600)] = 10.0
    body_timeout_s: Annotated[float, _seconds("0.001", 3600)] = 30.0
    keepalive_timeout_s: Annotated[float, _seconds("0", 3600)] = 75.0
    max_connections: Annotated[int, _whole(1, 1_000_000)] = 10_000


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
_PARSERS: Final[Mapping[str, Mapping[str, Parse[Any]]]] = MappingProxyType(
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
    return tuple(_PARSERS[table])


# -- loading -------------------------------------------------------------------------------------


def find_config(explicit: str | Path | None, environ: Mapping[str, str]) -> Path:
    """The file to read: as named, else $GWPROXY_CONFIG, else the first of CONFIG_PATHS."""
    if explicit is not None:
        return Path(explicit)
    if named := environ.get("GWPROXY_CONFIG"):
        return Path(named)
    for path in CONFIG_PATHS:
        if path.is_file():
            return path
    what = f"there is no configuration file, and no {CONFIG_PATHS[1]} either"
    raise ConfigError(
        Problem(str(CONFIG_PATHS[0]), "", what, f"{_NAME_ONE}; `make run` needs none")
    )


def load(
    path: Path | None,
    environ: Mapping[str, str],
    *,
    catalogue: Mapping[str, str] = MappingProxyType({}),
    local: bool = False,
) -> Config:
    """Reads the file (None: the environment alone) and raises ConfigError with all problems.

    `local`: for whoever asks nobody upstream, so that variables which only that would need may be
    missing.

    `catalogue` has the names under which providers are known, each with the prefix it stands for:
    a chain may use them, also without a table of their own.
    """
    tree = {} if path is None else _read_toml(path)
    if local:
        environ = {**_stand_ins(tree, environ), **environ}
    return _Reader(path, tree, environ, catalogue).config()


def _stand_ins(tree: dict[str, Any], environ: Mapping[str, str]) -> dict[str, str]:
    """Values for the variables of the upstream that are not set: nobody will see them."""
    families = [names for names in FAMILIES.values() if not any(map(environ.get, names))]
    missing = {names[0]: _STAND_IN for names in families}
    tables = [tree.get("upstream"), *_tables(tree.get("providers"))]
    for table in tables:
        for value in table.values() if isinstance(table, dict) else ():
            if isinstance(value, str) and value.startswith("env:"):
                name = value.removeprefix("env:")
                if not any(map(environ.get, _family(name))):
                    missing[name] = _STAND_IN
    return missing


def _tables(found: Any) -> list[Any]:
    return [*found.values()] if isinstance(found, dict) else []


_STAND_IN: Final = "0" * 32
"""It has the form of an account's id, and of any token."""

_NAME_ONE: Final = "name one by --config FILE or GWPROXY_CONFIG"


def _read_toml(path: Path) -> dict[str, Any]:
    def error(what: str, cure: str, line: int | None = None) -> ConfigError:
        return ConfigError(Problem(str(path), f"line {line}" if line else "", what, cure))

    try:
        with path.open("rb") as stream:
            data = stream.read(FILE_LIMIT_BYTES + 1)
    except FileNotFoundError:
        raise error("the file does not exist", _NAME_ONE) from None
    except OSError as cause:
        what = f"the file cannot be read ({cause.strerror})"
        raise error(what, "check its path and permissions") from None
    if len(data) > FILE_LIMIT_BYTES:
        raise error("the file is larger than 1 MiB", "check that it is the right one")
    try:
        text = data.decode()
    except UnicodeDecodeError as cause:
        line = data.count(b"\n", 0, cause.start) + 1
        raise error("the file is not UTF-8", "save it as UTF-8", line) from None
    try:
        # Money is read exactly: a binary float never sees it.
        return tomllib.loads(text, parse_float=Decimal)
    except (ValueError, InvalidOperation, RecursionError) as cause:
        said = re.fullmatch(r"(.*) \(at (?:line (\d+), column \d+|end of document)\)", str(cause))
        cure = "see https://toml.io for how it is written"
        if said is None:
            raise error("the file is not valid TOML", cure) from None
        line = int(said[2]) if said[2] else text.count("\n") + 1
        raise error(f"the file is not valid TOML ({said[1]})", cure, line) from None


@dataclass(frozen=True, slots=True)
class _FromEnv:
    """A leaf of the tree that the environment has put there."""

    text: str
    variable: str


class _Reader:
    """Walks the tree once, keeps every problem, and builds the Config if there is none."""

    def __init__(
        self,
        path: Path | None,
        tree: dict[str, Any],
        environ: Mapping[str, str],
        catalogue: Mapping[str, str],
    ) -> None:
        self.path = path
        self.tree = tree
        self.environ = environ
        self.catalogue = catalogue
        folder = (path.parent if path is not None else Path()).absolute()
        # systemd separates several state directories by colons; ours is the first.
        state = environ.get("STATE_DIRECTORY", "").split(":")[0]
        self.place = _Place(environ, folder, Path(state).absolute() if state else folder)
        self.problems: list[Problem] = []
        self.refused: set[str] = set()
        """Keys whose value was wrong: that has been told, so they are not told to be missing."""
        self.warnings: list[str] = []

    def config(self) -> Config:
        self._check_families()
        self.providers_in_file = frozenset(self._branch("providers"))
        self._lay_environment_over()
        self._check_table_names()
        server, admin = Server(**self._table("server")), self._admin()
        self._check_listeners(server.listen, admin.listen)
        upstream = self._upstream()
        providers = self._providers(upstream)
        config = Config(
            file=self.path,
            server=server,
            admin=admin,
            upstream=upstream,
            providers=MappingProxyType(providers),
            models=MappingProxyType(self._models(providers)),
            breaker=Breaker(**self._table("breaker")),
            quota=self._quota(),
            failure=Failure(**self._table("failure")),
            prices=self._prices(),
            storage=self._storage(),
            log=Log(**self._table("log")),
            metrics=Metrics(**self._table("metrics")),
            limits=Limits(**self._table("limits")),
            warnings=tuple(self.warnings),
        )
        if self.problems:
            raise ConfigError(*dict.fromkeys(self.problems))
        return config

    # -- the environment --

    def _check_families(self) -> None:
        for first, second in FAMILIES.values():
            one, other = self.environ.get(first), self.environ.get(second)
            if one and other and one != other:
                self._problem_of_variable(
                    f"{first} and {second}",
                    "are set to different values",
                    "unset one of them: they are two names of the same thing",
                )

    def _lay_environment_over(self) -> None:
        """Puts the environment's values into the tree, in place of the file's."""
        for variable, key in BREAKER_VARIABLES.items():
            if text := self.environ.get(variable):
                self._put(("breaker",), key, _FromEnv(text, variable))
        for variable, text in sorted(self.environ.items()):
            if variable.upper().startswith("GWPROXY__"):
                self._override(variable, text)
            elif meant := _meant_override(variable):
                self.warnings.append(f"{variable} is not read: did you mean {meant}?")

    def _override(self, variable: str, text: str) -> None:
        segments = variable.split("__")[1:]
        for table in TABLES:
            steps = table.removesuffix(".*").split(".")
            rest = segments[len(steps) :]
            if (
                [segment.lower() for segment in segments[: len(steps)]] == steps
                and len(rest) == (2 if table.endswith("*") else 1)
                and all(rest)
                and rest[-1].lower() in keys_of(table)
            ):
                names = self._branch(*steps) if len(rest) == 2 else {}
                names_of_tables = [_matching_name(name, names) for name in rest[:-1]]
                self._put((*steps, *names_of_tables), rest[-1].lower(), _FromEnv(text, variable))
                return
        known = list(_variables(self.tree))
        same_key = [name for name in known if name.split("__")[-1] == segments[-1].upper()]
        # Compared without what all have in common, which would make everything look alike.
        near = _nearest(
            variable.upper().removeprefix("GWPROXY__"),
            [name.removeprefix("GWPROXY__") for name in same_key or known],
        )
        self._problem_of_variable(
            variable,
            "names no key of the configuration",
            f"did you mean GWPROXY__{near}?" if near else "write GWPROXY__TABLE__KEY",
        )

    def _put(self, steps: tuple[str, ...], key: str, value: _FromEnv) -> None:
        node = self.tree
        for step in steps:
            child = node.setdefault(step, {})
            if not isinstance(child, dict):
                return  # the file has no table there: that is told when it is read
            node = child
        node[key] = value

    # -- tables and keys --

    def _problem(self, key: str, what: str, cure: str) -> None:
        self.problems.append(Problem(str(self.path or "environment"), key, what, cure))

    def _problem_of_variable(self, variable: str, what: str, cure: str) -> None:
        self.problems.append(Problem("environment", variable, what, cure))

    def _branch(self, *steps: str) -> dict[str, Any]:
        """The table at a path as it was written; empty where there is none."""
        node: Any = self.tree
        for number, step in enumerate(steps, start=1):
            node = node.get(step, {})
            if not isinstance(node, dict):
                if isinstance(node, _FromEnv):
                    raise AssertionError("the environment puts values only where keys are")
                path = _dotted(*steps[:number])
                self._problem(path, f"must be a table, not {_kind(node)}", f"write [{path}]")
                return {}
        return cast("dict[str, Any]", node)

    def _table(self, table: str, name: str | None = None) -> dict[str, Any]:
        """The checked values of one table. A wrong value is noted and left out, so that its
        default stands in for it until all problems are known."""
        steps = table.removesuffix(".*").split(".") + ([] if name is None else [name])
        branch = self._branch(*steps)
        path = _dotted(*steps)
        found: dict[str, Any] = {}
        for item in fields(TABLES[table]):
            key = item.name
            if key not in _PARSERS[table]:
                continue
            value = branch.get(key)
            if isinstance(value, _FromEnv) and not value.text and item.default is None:
                continue  # an empty variable takes an optional value away
            if value is not None:
                self._parse(found, table, key, value, path)
            elif item.default is MISSING:
                self._problem(f"{path}.{key}", "is missing", f"add {key} = ... to [{path}]")
        for key in branch.keys() - _PARSERS[table].keys():
            self._unknown_key(key, table, path)
        return found

    def _parse(self, found: dict[str, Any], table: str, key: str, value: object, path: str) -> None:
        variable = value.variable if isinstance(value, _FromEnv) else None
        text = value.text if isinstance(value, _FromEnv) else value
        try:
            found[key] = _PARSERS[table][key](_Raw(text, variable, self.place))
        except _Wrong as wrong:
            if (
                isinstance(wrong, _Unset)
                and table == "upstream"
                and wrong.variable in FAMILIES.get(key, ())
            ):
                return  # which of Cloudflare's three are not set is told in one sentence
            self.refused.add(f"{path}.{key}")
            if variable is None:
                self._problem(f"{path}.{key}", wrong.what, wrong.cure)
            else:
                self._problem_of_variable(variable, wrong.what, wrong.cure)

    def _unknown_key(self, key: str, table: str, path: str) -> None:
        place = f"{path}.{_dotted(key)}"
        if _is_provider_key(key) and table != "admin":
            self._problem(place, *_NO_PROVIDER_KEYS)
            return
        if near := _nearest(key, keys_of(table)):
            cure = f'did you mean "{near}"?'
        elif home := _home_of(key):
            cure = f"it belongs to [{home}]"
        else:
            cure = f"known: {', '.join(keys_of(table))}"
        self._problem(place, "is not a key of this table", cure)

    def _check_table_names(self) -> None:
        known = list(dict.fromkeys(table.split(".")[0] for table in TABLES))
        for name, value in self.tree.items():
            if name in known:
                continue
            near = _nearest(name, known)
            if _is_provider_key(name):
                self._problem(_dotted(name), *_NO_PROVIDER_KEYS)
            elif isinstance(value, dict):
                cure = f"did you mean [{near}]?" if near else f"known: {', '.join(known)}"
                self._problem(_dotted(name), "is not a table of the configuration", cure)
            else:
                home = _home_of(name)
                cure = f"it belongs to [{home}]" if home else "put it into its table"
                self._problem(_dotted(name), "is not a key of the configuration", cure)
        for name in self._branch("prices").keys() - {"models"}:
            cure = 'write [prices.models."provider/model"]'
            self._problem(_dotted("prices", name), "is not a key of [prices]", cure)

    # -- tables with rules of their own --

    def _admin(self) -> Admin:
        found = self._table("admin")
        if "key" not in self._branch("admin"):
            self._parse(found, "admin", "key", "env:GWPROXY_ADMIN_KEY", "admin")
        self._check_secret(found.get("key"), "admin", "key")
        return Admin(**found)

    def _check_listeners(self, public: Listen, admin: Listen | None) -> None:
        if public == admin and not (public.kind == "tcp" and public.port == 0):
            self._problem(
                "admin.listen",
                f"is the address of server.listen too ({public})",
                "choose another, or leave it out to share the listener",
            )

    def _upstream(self) -> Upstream:
        written = self._branch("upstream")
        found = self._table("upstream")
        flavour, base_url = found.get("flavour", "cloudflare-compat"), found.get("base_url")
        if flavour != "openai":
            # By default only: Cloudflare's token is not shown to another server unasked.
            for key, (variable, _) in FAMILIES.items():
                if key not in written:
                    self._parse(found, "upstream", key, f"env:{variable}", "upstream")
        token = found.get("token")
        if base_url is not None:
            self._check_base_url(base_url, flavour, "upstream.base_url")
            if token is None and "token" in written and "upstream.token" not in self.refused:
                self.warnings.append("upstream.token is not set: requests are sent without one")
        elif "upstream.base_url" in self.refused:
            pass
        elif flavour == "openai":
            self._problem("upstream.base_url", *_OPENAI_NEEDS_BASE_URL)
        elif absent := [
            " or ".join(family)
            for key, family in FAMILIES.items()
            if key not in found and f"upstream.{key}" not in self.refused
        ]:
            others = "" if len(absent) == len(FAMILIES) else " beside the others"
            self._problem(
                "upstream",
                f"not set: {', '.join(absent)}",
                f"Cloudflare needs them{others}; `make run` shows the gateway without any",
            )
        self._check_secret(token, "upstream", "token")
        self._check_upstream_token(token, flavour, "upstream.token")
        upstream = Upstream(root=base_url or _cloudflare_root(flavour, found), **found)
        if upstream.total_timeout_s < upstream.answer_timeout_s:
            self.warnings.append(
                "upstream.total_timeout_s is below answer_timeout_s: it ends the wait before"
            )
        return upstream

    def _providers(self, upstream: Upstream) -> dict[str, Provider]:
        providers: dict[str, Provider] = {}
        for name, value in self._branch("providers").items():
            path = _dotted("providers", name)
            if _is_provider_key(name) and not isinstance(value, dict):
                self._problem(path, *_NO_PROVIDER_KEYS)
            elif re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", name):
                self._check_name_from_environment(name)
                providers[name] = self._provider(name, path, upstream)
            else:
                form = "use at most 64 of a-z, 0-9, _ and -, with a letter or digit first"
                self._problem(path, "is not a provider's name", form)
        return providers

    def _check_name_from_environment(self, name: str) -> None:
        """A misspelt name would make a provider that nobody wanted, and change nothing else."""
        written = self._branch("providers", name)
        if name in self.providers_in_file or written.keys() & {"prefix", "model", "base_url"}:
            return
        others = [other for other in self._branch("providers") if other != name]
        near = _nearest(name, others)
        for value in written.values():
            if isinstance(value, _FromEnv):
                self._problem_of_variable(
                    value.variable,
                    f"there is no [providers.{name}] with a prefix, model or base_url",
                    f'did you mean "{near}"?' if near else "add one, or set its MODEL as well",
                )

    def _provider(self, name: str, path: str, upstream: Upstream) -> Provider:
        found = self._table("providers.*", name)
        flavour = found.setdefault("flavour", upstream.flavour)
        base_url, token = found.get("base_url"), found.get("token")
        self._check_secret(token, "providers", name, "token")
        self._check_upstream_token(token, flavour, f"{path}.token")
        if base_url is not None:
            root = base_url
            self._check_base_url(base_url, flavour, f"{path}.base_url")
        elif flavour == upstream.flavour:
            root = upstream.root
        elif flavour == "openai":
            root = ""
            if f"{path}.base_url" not in self.refused:
                self._problem(f"{path}.base_url", *_OPENAI_NEEDS_BASE_URL)
        else:
            ids = {"account_id": upstream.account_id, "gateway_id": upstream.gateway_id}
            root = _cloudflare_root(flavour, ids)
            if token is None and upstream.flavour != OPENAI and upstream.base_url is None:
                token = found["token"] = upstream.token  # both are Cloudflare's
            if token is None or None in ids.values():
                self._problem(
                    path,
                    f"the flavour {flavour} needs a token here and both ids in [upstream]",
                    "add token, upstream.account_id and upstream.gateway_id, or a base_url",
                )
        if token is None and upstream.token is not None:
            # A token belongs to the server it was made for: no other one gets to see it.
            if _origin(root) == _origin(upstream.root):
                found["token"] = upstream.token
            elif base_url is not None and not _is_loopback(base_url):
                self.warnings.append(
                    f"{path} has a base_url of its own but no token: requests go there without one"
                )
        prefix, model = found.get("prefix"), found.get("model")
        if flavour == REST and (prefix or "").startswith("custom-"):
            self._problem(
                f"{path}.flavour",
                "custom providers are not on the REST API",
                'write flavour = "cloudflare-compat" there',
            )
        if prefix and model and model.startswith(f"{prefix}/"):
            self.warnings.append(
                f"{path}.model repeats the prefix: the upstream is asked for {prefix}/{model}"
            )
        return Provider(name=name, root=root, **found)

    def _models(self, providers: Mapping[str, Provider]) -> dict[str, Model]:
        models: dict[str, Model] = {}
        for name in self._branch("models"):
            path = _dotted("models", name)
            if not re.fullmatch(r"[\x21-\x7e]{1,256}", name):
                self._problem(path, "is not a model's name", "use visible ASCII without spaces")
                continue
            chain: list[ChainEntry] = []
            for link in self._table("models.*", name).get("chain", ()):
                try:
                    entry = self._entry(link, providers)
                except _Wrong as no_provider:
                    wrong = no_provider
                    if link.provider in self._branch("models"):
                        wrong = self._chain_in_chain(name, link.provider)
                    self._problem(f"{path}.chain", wrong.what, wrong.cure)
                    continue
                if (entry.provider, entry.model) in [(one.provider, one.model) for one in chain]:
                    what = f"names {entry.provider} with {_show(entry.model)} twice"
                    self._problem(f"{path}.chain", what, "remove one")
                chain.append(entry)
            models[name] = Model(name, tuple(chain))
        if "auto" in models:
            for variable in ("AI_PROVIDER", "AI_MODEL", "AI_FALLBACK_PROVIDERS"):
                if self.environ.get(variable):
                    self.warnings.append(
                        f"{variable} changes nothing: [models.auto] in the configuration decides"
                    )
        elif auto := self._auto(providers):
            models["auto"] = Model("auto", auto)
        return models

    def _chain_in_chain(self, name: str, other: str) -> _Wrong:
        """What is wrong with a chain that names another one, or itself."""
        way = [name]
        while other and other not in way:
            way.append(other)
            links = self._table("models.*", other).get("chain", ())
            names = [link.provider for link in links]
            other = next((each for each in names if each in self._branch("models")), "")
        if other == name:
            what = f"leads in a circle: {' -> '.join([*way, name])}"
        else:
            what = f"names the chain {_show(way[1])}, which is no provider"
        return _Wrong(what, "list the providers themselves: no chain has another one in it")

    def _entry(self, link: _Link, providers: Mapping[str, Provider]) -> ChainEntry:
        """A candidate whose provider is one of the tables (by its name, its prefix or an alias)
        or of the catalogue."""
        slug = self.catalogue.get(link.provider)
        provider = providers.get(link.provider) or next(
            (
                provider
                for provider in providers.values()
                if (provider.prefix or provider.name) in (link.provider, slug)
                or self.catalogue.get(provider.prefix or provider.name, "") == slug
            ),
            None,
        )
        if provider is None and slug is None:
            near = _nearest(link.provider, [*providers, *self.catalogue])
            raise _Wrong(
                f"there is no provider {_show(link.provider)}",
                f'did you mean "{near}"?' if near else "add a table [providers.NAME] for it",
            )
        model = link.model or (provider.model if provider is not None else None)
        if model is None:
            raise _Wrong(
                f"provider {_show(link.provider)} has no model to serve here",
                f'write {{ provider = "{link.provider}", model = "..." }} or set its `model`',
            )
        name = provider.name if provider is not None else slug
        assert name is not None, "one of the two was found"
        return ChainEntry(name, model, link.weight)

    def _auto(self, providers: Mapping[str, Provider]) -> tuple[ChainEntry, ...]:
        """The chain of `auto` where the file has none: AI_PROVIDER, then AI_FALLBACK_PROVIDERS."""
        first = self.environ.get("AI_PROVIDER", "").strip().lower()
        model = self.environ.get("AI_MODEL", "").strip() or None
        fallbacks = self.environ.get("AI_FALLBACK_PROVIDERS", "").lower()
        chain: list[ChainEntry] = []
        if first:
            try:
                chain.append(self._entry(_Link(first, model, 0), providers))
            except _Wrong as wrong:
                self._problem_of_variable("AI_PROVIDER", wrong.what, wrong.cure)
        elif model:
            self.warnings.append("AI_MODEL changes nothing without AI_PROVIDER")
        skipped: list[str] = []
        for name in (fallbacks or DEFAULT_FALLBACKS).split(","):
            if not name.strip():
                continue
            try:
                entry = self._entry(_Link(name.strip(), None, 0), providers)
            except _Wrong as wrong:
                skipped.append(f"fallback provider {_show(name.strip())} is skipped: {wrong.what}")
                continue
            if all(entry.provider != other.provider for other in chain):
                chain.append(entry)
        # Who did not write the list need not hear of what it has.
        if fallbacks:
            self.warnings.extend(skipped)
        return tuple(chain)

    def _prices(self) -> Prices:
        models: dict[str, Price] = {}
        for name in self._branch("prices", "models"):
            found = self._table("prices.models.*", name)
            if not re.fullmatch(r"(?!/)[\x21-\x7e]{1,256}(?<!/)", name):
                path = _dotted("prices", "models", name)
                self._problem(path, "is not a model's name", 'write "provider/model"')
            if {"input", "output"} <= found.keys():
                models[name] = Price(**found)
        return Prices(MappingProxyType(models))

    def _quota(self) -> Quota:
        quota = Quota(**self._table("quota"))
        self._check_secret(quota.alert_webhook_secret, "quota", "alert_webhook_secret")
        return quota

    def _storage(self) -> Storage:
        found = self._table("storage")
        for key, name in (("path", "gwproxy.db"), ("journal", "journal")):
            found.setdefault(key, self.place.state_folder / name)
        if found["journal"] in (found["path"], found["path"].parent):
            self._problem(
                "storage.journal",
                "is the database's own path or folder",
                "give the journal a folder of its own",
            )
        storage = Storage(**found)
        if storage.journal_max_bytes < 3 * storage.journal_segment_bytes:
            self._problem(
                "storage.journal_max_bytes",
                "has no room for three segments",
                f"write {3 * storage.journal_segment_bytes} or more",
            )
        return storage

    # -- rules for secrets and addresses --

    def _check_secret(self, secret: Secret | None, *steps: str) -> None:
        """A secret in the file itself is safe only while nobody else can read the file."""
        value = self._branch(*steps[:-1]).get(steps[-1])
        if (
            secret is None
            or self.path is None
            or not isinstance(value, str)
            or _is_reference(value)
        ):
            return
        if self.path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
            self.warnings.append(
                f"{self.path} can be read by others and has a secret in {_dotted(*steps)}: "
                "chmod 600, or write env:NAME, file:/path or credential:NAME"
            )

    def _check_upstream_token(self, token: Secret | None, flavour: str, key: str) -> None:
        """A provider's own key in the place of Cloudflare's would be sent as what it is not."""
        if token is None or flavour == "openai":
            return
        if token.reveal().startswith(("sk-", "AIza", "gsk_", "hf_", "xai-", "pplx-")):
            self._problem(
                key,
                "looks like a provider's own key, not like a Cloudflare API token",
                "store it at Cloudflare (AI Gateway, Provider Keys) and put an API token with "
                "the permission AI Gateway: Run here",
            )

    def _check_base_url(self, url: str, flavour: str, key: str) -> None:
        if flavour == "cloudflare-compat" and url.endswith("/compat"):
            self._problem(key, "ends in /compat, which is appended", "write what stands before it")
        if url.startswith("http:") and not _is_loopback(url):
            self.warnings.append(
                f"{key} is http to another machine: tokens, prompts and answers travel unencrypted"
            )


_NO_PROVIDER_KEYS: Final = (
    "a provider's key does not belong into the configuration",
    "store it at Cloudflare (AI Gateway, Provider Keys: BYOK) and remove it here",
)
_OPENAI_NEEDS_BASE_URL: Final = (
    'is missing: the flavour "openai" has no address of its own',
    'add one such as base_url = "http://127.0.0.1:9000/v1"',
)


# -- words and names -----------------------------------------------------------------------------


def _dereference(raw: _Raw) -> str:
    """The text behind `env:`, `file:` and `credential:`; other text stands for itself."""
    value = raw.value
    if not isinstance(value, str):
        # Not shown: it may be the secret itself, written without its quotes.
        raise _Wrong(f"must be text, not {_kind(value)}", "put it in quotes, or write env:NAME")
    if not _is_reference(value):
        return value
    scheme, _, name = value.partition(":")
    if not name:
        raise _Wrong(f'"{scheme}:" names nothing', f"write {scheme}:NAME")
    if scheme == "env":
        for variable in _family(name):
            if text := raw.place.environ.get(variable):
                return text
        raise _Unset(name)
    if scheme == "file":
        return _secret_file(raw.place.folder / name)
    folder = raw.place.environ.get("CREDENTIALS_DIRECTORY")
    if not folder:
        raise _Wrong(
            f"credential:{name} needs $CREDENTIALS_DIRECTORY, which is not set",
            f"start the service by systemd with LoadCredential={name}:/path",
        )
    if "/" in name or name in (".", ".."):
        raise _Wrong("a credential's name has no slash", "write the name given to LoadCredential=")
    return _secret_file(Path(folder) / name)


def _is_reference(text: str) -> bool:
    return text.startswith(("env:", "file:", "credential:"))


def _secret_file(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            data = stream.read(SECRET_LIMIT_BYTES + 1)
        text = data.decode()
    except OSError as error:
        raise _Wrong(
            f"{path} cannot be read ({error.strerror})", "check its path and permissions"
        ) from None
    except UnicodeDecodeError:
        raise _Wrong(f"{path} is not text", "put the secret alone into it") from None
    if len(data) > SECRET_LIMIT_BYTES:
        raise _Wrong(f"{path} is larger than 64 KiB", "put the secret alone into it")
    if not text.strip():
        raise _Wrong(f"{path} is empty", "put the secret into it")
    return text


def _family(variable: str) -> tuple[str, ...]:
    """A variable followed by its other name, if it has one."""
    for pair in FAMILIES.values():
        if variable in pair:
            return (variable, *(name for name in pair if name != variable))
    return (variable,)


def _decimal(raw: _Raw) -> Decimal | None:
    value = raw.value
    if raw.variable is not None:
        if not re.fullmatch(r"[+-]?[0-9]{1,18}(\.[0-9]{1,18})?", raw.text()):
            return None
        return Decimal(raw.text())
    if isinstance(value, Decimal):
        return value
    return Decimal(value) if isinstance(value, int) and not isinstance(value, bool) else None


def _list_from_text(text: str, cure: str) -> list[Any]:
    """A list in a variable: names with commas between them, or as TOML writes it."""
    if not text.lstrip().startswith("["):
        return [name.strip() for name in text.split(",") if name.strip()]
    try:
        entries = tomllib.loads(f"list = {text}", parse_float=Decimal)
    except (ValueError, InvalidOperation, RecursionError):
        raise _Wrong("is not a list as TOML writes it", cure) from None
    if entries.keys() != {"list"} or not isinstance(entries["list"], list):
        raise _Wrong("is not a list as TOML writes it", cure)
    return entries["list"]


def _matching_name(segment: str, names: Collection[str]) -> str:
    """The name in the file that a variable means: a variable's name has no case, dash or slash."""
    for name in names:
        if _flat(name) == _flat(segment):
            return name
    return segment.lower() if segment.isupper() else segment


def _variables(tree: Mapping[str, Any]) -> Iterator[str]:
    """Every variable that would be understood, for suggestions."""
    for table in TABLES:
        *steps, last = table.split(".")
        names = [last]
        if last == "*":
            node: Any = tree
            for step in steps:
                node = node.get(step, {}) if isinstance(node, Mapping) else {}
            names = list(node) if isinstance(node, Mapping) else []
        for name in names:
            for key in keys_of(table):
                yield "__".join(("GWPROXY", *steps, _flat(name), key)).upper()


def _meant_override(variable: str) -> str | None:
    """GWPROXY_SERVER_LISTEN is one underscore short, twice, and would be ignored in silence."""
    if not variable.startswith("GWPROXY_") or variable == "GWPROXY_ADMIN_KEY":
        return None
    for known in _variables({}):
        if re.sub("_+", "_", known) == re.sub("_+", "_", variable.upper()):
            return known
    return None


def _home_of(key: str) -> str | None:
    """The table in which a misplaced key would be right."""
    homes = [table for table in TABLES if key in keys_of(table)]
    return homes[0].replace("*", "NAME") if len(homes) == 1 else None


def _is_provider_key(name: str) -> bool:
    return re.search(r"(^|_)(api_?keys?|secret|secret_?key|access_?key)$", _flat(name)) is not None


def _nearest(word: str, known: Collection[str]) -> str | None:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return near[0] if near else None


def _flat(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower())


def _dotted(*steps: str) -> str:
    return ".".join(one if re.fullmatch(r"[A-Za-z0-9_-]+", one) else _show(one) for one in steps)


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _cloudflare_root(flavour: str, ids: Mapping[str, Any]) -> str:
    root = REST_ROOT if flavour == REST else COMPAT_ROOT
    return root.format(account=ids.get("account_id"), gateway=ids.get("gateway_id"))


def _kind(value: object) -> str:
    """A TOML type in words."""
    words: tuple[tuple[type, str], ...] = (
        (bool, "true or false"),
        (int, "a number"),
        (Decimal, "a number"),
        (str, "text"),
        (list, "a list"),
        (dict, "a table"),
    )
    return next((word for kind, word in words if isinstance(value, kind)), "a date or time")


def _show(value: object) -> str:
    """A value for an error's text: short, on one line, nothing unprintable."""
    if isinstance(value, str):
        short = value if len(value) <= 60 else value[:57] + "..."
        return '"' + "".join(c if c.isprintable() else ascii(c)[1:-1] for c in short) + '"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value) if -(10**18) < value < 10**18 else "a huge number"
    if isinstance(value, Decimal):
        text = format(value, "g") if not value.is_finite() or -30 < value.adjusted() < 30 else ""
        return text[:60] or "a number of absurd size"
    return _kind(value)


def _between(low: int | str, high: int) -> str:
    return f"write a number from {low} to {high}"
