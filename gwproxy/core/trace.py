"""What happened to one request, gathered while it happens: the log line and the metrics read it.

Ids, numbers and words of ours only: never a key, a prompt, an answer.
"""

import math
from typing import Final

import msgspec

from gwproxy.core.identity import Principal


class Attempt:
    """One try at one provider, as the log shows it."""

    __slots__ = ("cost", "duration_s", "error_type", "model", "provider", "reason", "status")

    def __init__(self, provider: str, model: str) -> None:
        self.provider = provider
        self.model = model
        self.status: int | None = None
        self.error_type = ""
        self.reason = ""
        self.duration_s = 0.0
        self.cost = 0
        """What it may have cost, in nano-USD."""


class Trace:
    """One request. Times are monotonic seconds.

    The values below are what holds until it is known better; set once each on the way.
    """

    principal: Principal | None = None
    model: str = ""
    """As the caller named it, once it was resolved to candidates."""
    stream: bool = False
    provider: str = ""
    provider_model: str = ""
    skipped: tuple[str, ...] = ()
    """Candidates that were passed over, each with the reason."""
    wait_s: float = math.inf
    """When the first of them may be asked again."""
    gateway_s: float = 0.0
    """Our own time, until the last attempt began: what earlier ones took is their providers'."""
    began_at: float = 0.0
    """When that one did."""
    first_byte_at: float = 0.0
    ended_at: float = 0.0
    status: int = 0
    error_type: str = ""
    error_code: str | None = None
    outcome: str = ""
    source: str = ""
    tokens: tuple[int, int, int, int, int] | None = None
    """Input, cache reads, cache writes, output, and the reasoning that is part of the output."""
    cost_nanos: int | None = None
    price_version: str = ""
    degraded: bool = False
    """Let in, or refused by the outage's own budget, while the database was lost."""
    log_id: str = ""
    """The upstream's own id of its log record, known as soon as its head is."""

    def __init__(self, request_id: str, started: float) -> None:
        self.request_id = request_id
        self.started = started
        self.route = "other"
        self.attempts: list[Attempt] = []

    def json(self) -> str:
        """The members of the log line, as JSON without its braces."""
        started, tokens = self.started, self.tokens
        who = self.principal or _NOBODY
        stream = attempts = gateway_ms = upstream_ms = None
        if self.model:
            stream = self.stream
            attempts = [
                _AttemptLine(
                    one.provider,
                    one.model,
                    one.status,
                    int(one.duration_s * _CUT) / 100,
                    one.reason,
                )
                for one in self.attempts
            ]
        if self.first_byte_at:
            gateway_ms = int(self.gateway_s * _CUT) / 100
            upstream_ms = int((self.first_byte_at - self.began_at) * _CUT) / 100
        line = _Line(
            self.request_id,
            self.route,
            self.status,
            int((self.ended_at - started) * _CUT) / 100,
            who.user_id,
            who.org_id,
            who.key_id,
            self.model,
            stream,
            attempts,
            self.provider,
            gateway_ms,
            upstream_ms,
            self.outcome,
            self.cost_nanos,
            (self.source or None) if self.outcome else msgspec.UNSET,
            self.price_version,
            None if tokens is None else _TokensLine(*tokens),
            self.log_id,
            self.skipped,
            self.error_type,
            self.error_code if self.error_type else msgspec.UNSET,
            self.degraded,
        )
        return _encode(line)[1:-1].decode()


# -- the log line --------------------------------------------------------------------------------


class _AttemptLine(msgspec.Struct, omit_defaults=True, gc=False):
    provider: str
    model: str
    status: int | None
    duration_ms: float
    reason: str = ""


class _TokensLine(msgspec.Struct, gc=False):
    input: int
    cache_read: int
    cache_write: int
    output: int
    reasoning: int


class _Line(msgspec.Struct, omit_defaults=True, gc=False):
    """What is not known is left out. A struct costs half of a dict with the same members.

    Null says something: an outcome whose cost has no source, an error without a code.
    """

    request_id: str
    route: str
    status: int
    duration_ms: float
    user_id: str = ""
    org_id: str = ""
    key_id: str = ""
    model: str = ""
    stream: bool | None = None
    attempts: list[_AttemptLine] | None = None
    provider: str = ""
    gateway_ms: float | None = None
    upstream_ms: float | None = None
    outcome: str = ""
    cost_nanos: int | None = None
    source: str | msgspec.UnsetType | None = msgspec.UNSET
    price_version: str = ""
    tokens: _TokensLine | None = None
    cf_aig_log_id: str = ""
    skipped: tuple[str, ...] = ()
    error_type: str = ""
    error_code: str | msgspec.UnsetType | None = msgspec.UNSET
    degraded: bool = False


_encode: Final = msgspec.json.Encoder().encode

_CUT: Final = 100_000
"""Seconds times this, cut to an integer, are hundredths of a millisecond: cheaper than a format."""

_NOBODY: Final = Principal("", "", "", None, None)
