"""The whole process at a glance: how it stands, and what it has done since it started.

What a person asks before opening a dashboard, or a script that has no Prometheus. Money is the
ledger's, to the nano-dollar; all else is what the metrics have counted.
"""

import platform
from collections.abc import Callable
from typing import Annotated

import msgspec

from gwproxy import __version__
from gwproxy.admin.ask import Answer, Ask, Route
from gwproxy.core.money import format_usd
from gwproxy.core.period import rfc3339
from gwproxy.metrics import Metrics
from gwproxy.state.outage import Condition
from gwproxy.state.providers import GAUGE
from gwproxy.state.store import Store


class Part(msgspec.Struct):
    state: str
    cause: Annotated[str | None, msgspec.Meta(description="why it is lost")]


class HealthReport(msgspec.Struct):
    """`status`: ok, degraded (without the database), unavailable or draining."""

    status: str
    version: str
    python: str
    started_at: str
    uptime_s: float
    journal: Part
    database: Part
    journal_bytes: int
    last_record: Annotated[int, msgspec.Meta(description="the number of the journal's last one")]
    records_behind: Annotated[int, msgspec.Meta(description="which the database does not have yet")]
    last_backup_at: str | None
    replayed_at_start: int
    settled_at_start: Annotated[
        int, msgspec.Meta(description="requests that the process before had left open")
    ]
    forgotten_at_start: Annotated[
        str | None, msgspec.Meta(description="records that went down with the machine")
    ]
    streams_open: int
    holds_open: int
    oldest_hold_s: float
    breakers: Annotated[
        dict[str, str], msgspec.Meta(description="by provider: closed, half_open, open, disabled")
    ]
    tokenizer: Annotated[str, msgspec.Meta(description="exact, or estimated after a failed test")]
    memory_bytes: int
    open_files: int
    log_lines_dropped: int


class MetricsSummary(msgspec.Struct):
    """Counts are since the start of the process, money is of the month and as of now."""

    started_at: str
    requests: Annotated[dict[str, int], msgspec.Meta(description="by class of status: 2xx, 4xx")]
    errors: Annotated[dict[str, int], msgspec.Meta(description="by type, as in the metrics")]
    settlements: Annotated[dict[str, int], msgspec.Meta(description="by outcome")]
    quota_refusals: Annotated[dict[str, int], msgspec.Meta(description="by scope")]
    tokens: Annotated[dict[str, int], msgspec.Meta(description="by type")]
    fallbacks: int
    overruns: int
    auth_failures: int
    current_month: str
    month_usage_usd: str
    held_usd: str
    degraded_exposure_usd: Annotated[
        str, msgspec.Meta(description="today's, of requests let in while the database was lost")
    ]


_BREAKERS = {number: state.value for state, number in GAUGE.items()}


class Overview:
    def __init__(self, store: Store, metrics: Metrics, condition: Callable[[], Condition]) -> None:
        self._store = store
        self._metrics = metrics
        self._condition = condition

    def routes(self) -> tuple[Route, ...]:
        return (
            Route(
                method="GET",
                path="/admin/health",
                do=self.health,
                summary="How the process stands, with causes; always 200, unlike /health/ready.",
                answers=HealthReport,
            ),
            Route(
                method="GET",
                path="/admin/metrics",
                do=self.metrics,
                summary="What it has done since it started, as JSON; /metrics has all of it.",
                answers=MetricsSummary,
            ),
        )

    async def health(self, ask: Ask) -> Answer:
        metrics, store, condition = self._metrics, self._store, self._condition()
        metrics.read()
        process, now_ms = metrics.process(), store.ledger.now_ms()
        started_ms = _started_ms(process)
        backup = store.last_backup_at()
        found = store.recovery
        return Answer(
            HealthReport(
                status=condition.status,
                version=__version__,
                python=platform.python_version(),
                started_at=rfc3339(started_ms),
                uptime_s=max(0, now_ms - started_ms) / 1000,
                journal=_part(condition.journal),
                database=_part(condition.database),
                journal_bytes=int(metrics.journal_bytes.value),
                last_record=store.ledger.state.lsn,
                records_behind=int(metrics.ledger_queue.value),
                last_backup_at=None if backup is None else rfc3339(int(backup * 1000)),
                replayed_at_start=found.replayed,
                settled_at_start=found.settled,
                forgotten_at_start=found.forgotten,
                streams_open=int(metrics.streams_open.value),
                holds_open=int(metrics.holds_open.value),
                oldest_hold_s=metrics.hold_oldest.value,
                breakers={
                    name: _BREAKERS[number]
                    for name, number in metrics.by("gwproxy_breaker_state", "provider").items()
                },
                tokenizer="estimated" if metrics.tokenizer_fallback.value else "exact",
                memory_bytes=int(process.get("process_resident_memory_bytes", 0)),
                open_files=int(process.get("process_open_fds", 0)),
                log_lines_dropped=int(metrics.log_lines_dropped.value),
            )
        )

    async def metrics(self, ask: Ask) -> Answer:
        metrics, ledger = self._metrics, self._store.ledger
        month = ledger.periods()[0]
        balances = ledger.state.balances
        spent = sum(
            balance.spent
            for (account, period), balance in balances.items()
            if period == month and account.startswith("org:")
        )
        metrics.read()
        errors = metrics.by("gwproxy_requests_total", "error_type")
        errors.pop("", None)
        return Answer(
            MetricsSummary(
                started_at=rfc3339(_started_ms(metrics.process())),
                requests=metrics.by("gwproxy_requests_total", "status_class"),
                errors=errors,
                settlements=metrics.by("gwproxy_settlements_total", "outcome"),
                quota_refusals=metrics.by("gwproxy_quota_refusals_total", "scope"),
                tokens=metrics.by("gwproxy_tokens_total", "type"),
                fallbacks=sum(metrics.by("gwproxy_fallbacks_total", "reason").values()),
                overruns=int(metrics.overruns.value),
                auth_failures=int(metrics.auth_failures.value),
                current_month=month,
                month_usage_usd=format_usd(spent),
                held_usd=format_usd(sum(hold.amount for hold in ledger.state.holds.values())),
                degraded_exposure_usd=format_usd(round(metrics.degraded_exposure.value * 10**9)),
            )
        )


def _part(cause: str | None) -> Part:
    return Part("ok" if cause is None else "lost", cause)


def _started_ms(process: dict[str, float]) -> int:
    return int(process.get("process_start_time_seconds", 0) * 1000)
