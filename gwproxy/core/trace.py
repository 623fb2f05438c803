"""What happened to one request, gathered while it happens: the log line and the metrics read it.

Ids, numbers and words of ours only: never a key, a prompt, an answer.
"""

from dataclasses import dataclass, field
from typing import Any

from gwproxy.core.identity import Principal


@dataclass(slots=True)
class Attempt:
    """One try at one provider, as the log shows it."""

    provider: str
    model: str
    status: int | None = None
    reason: str = ""
    duration_ms: float = 0.0

    def fields(self) -> dict[str, Any]:
        return {
            "provider": self.provider,
            "model": self.model,
            "status": self.status,
            "reason": self.reason or None,
            "duration_ms": round(self.duration_ms, 1),
        }


@dataclass(slots=True)
class Trace:
    """Times are seconds of the event loop's clock."""

    request_id: str
    route: str
    started: float
    principal: Principal | None = None
    model: str = ""
    """The model as the caller named it, once it was resolved to candidates."""
    stream: bool = False
    provider: str = ""
    provider_model: str = ""
    attempts: list[Attempt] = field(default_factory=list)
    sent_at: float = 0.0
    first_byte_at: float = 0.0
    ended_at: float = 0.0
    status: int = 0
    error_type: str = ""
    error_code: str | None = None
    outcome: str = ""
    source: str = ""
    tokens: dict[str, int] | None = None
    cost_nanos: int | None = None
    price_version: str = ""
    log_id: str = ""
    """The upstream's own id of its log record, known as soon as its head is."""
