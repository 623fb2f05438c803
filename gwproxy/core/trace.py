"""What happened to one request, gathered while it happens: the log line and the metrics read it.

Ids, numbers and words of ours only: never a key, a prompt, an answer.
"""

from typing import Any

from gwproxy.core.identity import Principal


class Attempt:
    """One try at one provider, as the log shows it."""

    __slots__ = ("duration_s", "model", "provider", "reason", "status")

    def __init__(self, provider: str, model: str) -> None:
        self.provider = provider
        self.model = model
        self.status: int | None = None
        self.reason = ""
        self.duration_s = 0.0

    def fields(self) -> dict[str, Any]:
        return {
            "provider": self.provider,
            "model": self.model,
            "status": self.status,
            "reason": self.reason or None,
            "duration_ms": round(self.duration_s * 1000, 2),
        }


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
    sent_at: float = 0.0
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
    log_id: str = ""
    """The upstream's own id of its log record, known as soon as its head is."""

    def __init__(self, request_id: str, started: float) -> None:
        self.request_id = request_id
        self.started = started
        self.route = "other"
        self.attempts: list[Attempt] = []

    def fields(self) -> dict[str, Any]:
        """The log line. Called off the event loop, when nothing changes any more."""
        principal = self.principal
        fields: dict[str, Any] = {
            "request_id": self.request_id,
            "route": self.route,
            "status": self.status,
            "duration_ms": round((self.ended_at - self.started) * 1000, 2),
        }
        if principal is not None:
            fields["user_id"] = principal.user_id
            fields["org_id"] = principal.org_id
            fields["key_id"] = principal.key_id
        if self.model:
            fields["model"] = self.model
            fields["stream"] = self.stream
            fields["attempts"] = [attempt.fields() for attempt in self.attempts]
        if self.provider:
            fields["provider"] = self.provider
        if self.first_byte_at:
            fields["gateway_ms"] = round((self.sent_at - self.started) * 1000, 2)
            fields["upstream_ms"] = round((self.first_byte_at - self.sent_at) * 1000, 2)
        if self.outcome:
            fields["outcome"] = self.outcome
            fields["cost_nanos"] = self.cost_nanos
            fields["source"] = self.source or None
            fields["price_version"] = self.price_version
        if self.tokens is not None:
            fields["tokens"] = dict(zip(TOKEN_KINDS, self.tokens, strict=True))
        if self.log_id:
            fields["cf_aig_log_id"] = self.log_id
        if self.error_type:
            fields["error_type"] = self.error_type
            fields["error_code"] = self.error_code
        return fields


TOKEN_KINDS = ("input", "cache_read", "cache_write", "output", "reasoning")
