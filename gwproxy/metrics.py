"""Every Prometheus name, once, and the text that Prometheus reads. Labels come from closed sets; a
user or a key is never one.

The event loop counts in plain numbers, which is all that a request pays for. A scrape writes the
text format 0.0.4 straight from them, a page at a time: with the client library's objects in
between, thousands of series would hold every stream up for tens of milliseconds. What is known of
every process, its memory and its open files, is the library's to tell.
"""

import platform
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, islice
from typing import Final, Generic, TypeVar

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from gwproxy import __version__

CONTENT_TYPE: Final = CONTENT_TYPE_PLAIN_0_0_4

PAGE_SERIES: Final = 500
"""So many are written at once: about a quarter of a millisecond."""

OTHER: Final = "other"

MODEL_LABELS: Final = 200
"""Distinct model labels. The price table knows thousands; each one is rows in every scrape."""

TOKEN_KINDS: Final = ("input", "cache_read", "cache_write", "output", "reasoning")
"""The values of the label `type`; reasoning is part of the output."""

SCOPES: Final = ("key", "user", "org", "provider", "outage")
OUTCOMES: Final = (
    *("completed", "failed", "client_left", "truncated", "cut", "void", "unknown", "recovered"),
)
ALERTED_PERCENT: Final = (80, 95, 100)
"""Closed sets whose series are there from the start: Prometheus sees no increase in a series that
comes into being at 1, and so would miss the first of what is seldom."""

_REMEMBERED: Final = 4096
"""Combinations kept for a quick look-up. A caller has a say in them, so they are bounded."""

_OVERHEAD_S: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1)
_UPSTREAM_S: Final = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_GAP_S: Final = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0)
_COMMIT_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0, 5.0)
_STALL_S: Final = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0)

ERROR_TYPES: Final = frozenset(
    {
        "caller_invalid",
        "caller_auth",
        "caller_cancelled",
        "policy_quota",
        "policy_rate",
        "policy_model",
        "provider_auth",
        "provider_rate_limited",
        "provider_overloaded",
        "provider_error",
        "provider_timeout",
        "provider_connect",
        "provider_truncated",
        "gateway_storage",
        "gateway_internal",
        "other",
        "",
    }
)


class Count:
    """A number that goes up, or up and down. Add to `value`."""

    __slots__ = ("_series", "value")

    def __init__(self, name: str, labels: str) -> None:
        self._series = _series(name, labels)
        self.value: float = 0

    def lines(self) -> str:
        return f"{self._series}{float(self.value)!r}\n"


class Spread:
    """How often values fell into each bucket."""

    __slots__ = ("_count", "_series", "_sum", "bounds", "buckets", "total")

    def __init__(self, name: str, labels: str, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.buckets = [0] * (len(bounds) + 1)
        self.total = 0.0
        comma = "," if labels else ""
        self._series = [
            _series(f"{name}_bucket", f'{labels}{comma}le="{bound}"') for bound in (*bounds, "+Inf")
        ]
        self._sum = _series(f"{name}_sum", labels)
        self._count = _series(f"{name}_count", labels)

    def observe(self, value: float) -> None:
        self.buckets[bisect_left(self.bounds, value)] += 1
        self.total += value

    def lines(self) -> str:
        counts = list(accumulate(self.buckets))
        rows = (f"{text}{count}\n" for text, count in zip(self._series, counts, strict=True))
        return f"{''.join(rows)}{self._sum}{self.total!r}\n{self._count}{counts[-1]}\n"


def _series(name: str, labels: str) -> str:
    """A line up to its value."""
    return f"{name}{{{labels}}} " if labels else f"{name} "


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


Child = TypeVar("Child", Count, Spread)


class Family(Generic[Child]):
    """One metric with labels. A child is made when its labels are first asked for."""

    def __init__(
        self,
        kind: str,
        name: str,
        words: str,
        labels: Sequence[str],
        make: Callable[[str, str], Child],
    ) -> None:
        self.name = name
        self.labels = labels
        self.head = f"# HELP {name} {words}\n# TYPE {name} {kind}\n"
        self._make: Callable[[str, str], Child] = make
        self.children: dict[tuple[str, ...], Child] = {}

    def child(self, *values: str) -> Child:
        found = self.children.get(values)
        if found is None:
            pairs = zip(self.labels, values, strict=True)
            labels = ",".join(f'{label}="{_escaped(value)}"' for label, value in pairs)
            found = self.children[values] = self._make(self.name, labels)
        return found


class Metrics:
    """All metrics of one process. `models` are the names that may become a label.

    Plain attributes are counts and spreads without labels; the methods below find the child for
    some labels, bounding what a caller has a say in.
    """

    def __init__(
        self, providers: frozenset[str] = frozenset(), models: frozenset[str] = frozenset()
    ) -> None:
        self._providers = providers
        self._models = models
        self._model_labels: set[str] = set()
        self._families: list[Family[Count] | Family[Spread]] = []
        self._per_request: dict[tuple[str, str, str, int, str], Count] = {}
        self._ttfb_by_provider: dict[str, Spread] = {}
        self._per_settlement: dict[tuple[str, str, str], tuple[tuple[Count, ...], Count]] = {}

        self._requests = self._counter(
            "gwproxy_requests_total",
            "Requests answered.",
            "route",
            "provider",
            "model",
            "status_class",
            "error_type",
        )
        self.overhead = self._spread(
            "gwproxy_overhead_seconds",
            "Time from a request's head to its dispatch: what this proxy itself adds.",
            _OVERHEAD_S,
        ).child()
        self._ttfb = self._spread(
            "gwproxy_upstream_ttfb_seconds",
            "Time from a request sent upstream to the first byte of its answer's body.",
            _UPSTREAM_S,
            "provider",
        )
        self.stream_gap = self._spread(
            "gwproxy_stream_gap_seconds",
            "The longest silence of the upstream within a stream.",
            _GAP_S,
        ).child()
        self.streams_open = self._gauge(
            "gwproxy_streams_open", "Streams being relayed at this moment."
        ).child()
        self._tokens = self._counter(
            "gwproxy_tokens_total",
            "Tokens by where the count came from (provider, counted or estimated).",
            "provider",
            "model",
            "type",
            "source",
        )
        self._cost = self._counter(
            "gwproxy_cost_usd_total", "Cost of settled requests, in USD.", "provider", "model"
        )
        self._settlements = self._counter(
            "gwproxy_settlements_total", "Requests settled.", "outcome"
        )
        self.holds_open = self._gauge(
            "gwproxy_holds_open", "Requests admitted and not yet settled."
        ).child()
        self.hold_oldest = self._gauge(
            "gwproxy_hold_oldest_seconds", "Age of the oldest open hold; 0 while there is none."
        ).child()
        self.held = self._gauge("gwproxy_held_usd", "What open holds set aside, in USD.").child()
        self.overruns = self._counter(
            "gwproxy_overruns_total", "Requests that cost more than was held for them."
        ).child()
        self._quota_refusals = self._counter(
            "gwproxy_quota_refusals_total", "Requests refused by a budget.", "scope"
        )
        self._budget_alerts = self._counter(
            "gwproxy_budget_alerts_total",
            "Budgets of which most is spent: once per account, period and threshold.",
            "scope",
            "threshold",
        )
        self.storage_state = self._gauge(
            "gwproxy_storage_state", "The database: 0 in order, 1 lost."
        ).child()
        self.degraded_exposure = self._gauge(
            "gwproxy_degraded_exposure_usd",
            "Spent and held today while the database was lost, over all organizations, in USD.",
        ).child()
        self.journal_state = self._gauge(
            "gwproxy_journal_state", "The journal: 0 in order, 1 lost."
        ).child()
        self.journal_bytes = self._gauge(
            "gwproxy_journal_bytes", "Size of the journal's segments on disk."
        ).child()
        self.segments_missing = self._gauge(
            "gwproxy_journal_segments_missing",
            "Segments of the journal that somebody has taken away.",
        ).child()
        self.last_backup_at = self._gauge(
            "gwproxy_last_backup_timestamp_seconds",
            "When the newest backup of the database was made, in seconds since 1970; 0: never.",
        ).child()
        self.ledger_queue = self._gauge(
            "gwproxy_ledger_queue", "Records in the journal that the database does not have yet."
        ).child()
        self.ledger_commit = self._spread(
            "gwproxy_ledger_commit_seconds", "Time of one commit of the database.", _COMMIT_S
        ).child()
        self._fallbacks = self._counter(
            "gwproxy_fallbacks_total",
            "Attempts that moved on to the next provider.",
            "from",
            "to",
            "reason",
        )
        self._provider_attempts = self._counter(
            "gwproxy_provider_attempts_total",
            "Attempts at providers by what they ended with; one that was cancelled is none.",
            "provider",
            "outcome",
        )
        self._skipped = self._counter(
            "gwproxy_candidates_skipped_total",
            "Candidates of a chain that were passed over.",
            "provider",
            "reason",
        )
        self._breaker_states = self._gauge(
            "gwproxy_breaker_state",
            "A provider's breaker: 0 closed, 1 half-open, 2 open, 3 disabled by an admin.",
            "provider",
        )
        self._breaker_transitions = self._counter(
            "gwproxy_breaker_transitions_total",
            "Changes of a provider's breaker.",
            "provider",
            "from",
            "to",
        )
        self.auth_failures = self._counter(
            "gwproxy_auth_failures_total", "Requests without a valid key."
        ).child()
        self.tokenizer_fallback = self._gauge(
            "gwproxy_tokenizer_fallback",
            "1 when tokens are estimated from bytes because the tokenizer failed its self-test.",
        ).child()
        self._token_ratio = self._gauge(
            "gwproxy_token_ratio",
            "Tokens that a model's provider reports for one that is counted here.",
            "model",
            "text",
        )
        self._token_ratio_error = self._gauge(
            "gwproxy_token_ratio_error",
            "By how much predictions of reported tokens were off, as a share of what was reported.",
            "model",
            "text",
        )
        self._reconcile_drift = self._gauge(
            "gwproxy_reconcile_drift_usd",
            "What the gateway's log says less what the ledger does, at the last reconciliation.",
        )
        self._reconcile_lines = self._gauge(
            "gwproxy_reconcile_lines", "Lines of the last reconciliation by what was found.", "kind"
        )
        self.loop_stall = self._spread(
            "gwproxy_loop_stall_seconds", "How late the event loop's coarse timer fired.", _STALL_S
        ).child()
        self.log_lines_dropped = self._counter(
            "gwproxy_log_lines_dropped_total", "Log lines that their reader did not take in time."
        ).child()
        self._gauge(
            "gwproxy_build_info", "Always 1; the labels say what runs.", "version", "python"
        ).child(__version__, platform.python_version()).value = 1

        self._process = CollectorRegistry()
        ProcessCollector(registry=self._process)

        for outcome in OUTCOMES:
            self.settlement(outcome)
        for scope in SCOPES:
            self.quota_refusal(scope)
            for percent in ALERTED_PERCENT:
                self.budget_alert(scope, percent)

        self.refresh: list[Callable[[], None]] = []
        """Called before each scrape, by those whose gauges are cheaper read than kept."""

    def know(self, providers: frozenset[str], models: frozenset[str]) -> None:
        """These may become labels too: names that once were labels stay."""
        self._providers |= providers
        self._models |= models

    # -- children ----------------------------------------------------------------------------

    def request(self, route: str, provider: str, model: str, status: int, error_type: str) -> Count:
        key = (route, provider, model, status, error_type)
        found = self._per_request.get(key)
        if found is None:
            assert error_type in ERROR_TYPES, error_type
            found = self._requests.child(
                route,
                self._provider(provider),
                self._model(model),
                f"{status // 100}xx",
                error_type,
            )
            if len(self._per_request) < _REMEMBERED:
                self._per_request[key] = found
        return found

    def ttfb(self, provider: str) -> Spread:
        found = self._ttfb_by_provider.get(provider)
        if found is None:
            found = self._ttfb.child(self._provider(provider))
            if provider in self._providers:
                self._ttfb_by_provider[provider] = found
        return found

    def settled(
        self, provider: str, model: str, source: str, tokens: Sequence[int], usd: float
    ) -> None:
        """What one request consumed: tokens in the order of `TOKEN_KINDS`, and its cost."""
        key = (provider, model, source)
        found = self._per_settlement.get(key)
        if found is None:
            labels = self._provider(provider), self._model(model)
            kinds = tuple(self._tokens.child(*labels, kind, source) for kind in TOKEN_KINDS)
            found = kinds, self._cost.child(*labels)
            if len(self._per_settlement) < _REMEMBERED:
                self._per_settlement[key] = found
        counts, cost = found
        for count, number in zip(counts, tokens, strict=True):
            if number:
                count.value += number
        cost.value += usd

    def settlement(self, outcome: str) -> Count:
        return self._settlements.child(outcome)

    def reconciled(self, drift_usd: float, lines: Mapping[str, int]) -> None:
        """How the last reconciliation came out; `lines` by kind, a closed set."""
        self._reconcile_drift.child().value = drift_usd
        for kind in {kind for (kind,) in self._reconcile_lines.children} | lines.keys():
            self._reconcile_lines.child(kind).value = lines.get(kind, 0)

    def quota_refusal(self, scope: str) -> Count:
        return self._quota_refusals.child(scope)

    def budget_alert(self, scope: str, percent: int) -> Count:
        return self._budget_alerts.child(scope, str(percent))

    def fallback(self, old: str, new: str, reason: str) -> Count:
        return self._fallbacks.child(self._provider(old), self._provider(new), reason)

    def token_ratio(self, text: str, model: str, ratio: float, error: float) -> None:
        """How far our counts of a model's answers or prompts are off."""
        label = self._model(model)
        if label != OTHER:  # which would be of many, the last one's
            self._token_ratio.child(label, text).value = ratio
            self._token_ratio_error.child(label, text).value = error

    def provider_attempt(self, provider: str, outcome: str) -> Count:
        return self._provider_attempts.child(self._provider(provider), outcome)

    def skipped(self, provider: str, why: str) -> Count:
        return self._skipped.child(self._provider(provider), why)

    def breaker_state(self, provider: str) -> Count:
        return self._breaker_states.child(self._provider(provider))

    def breaker_transition(self, provider: str, before: str, after: str) -> Count:
        return self._breaker_transitions.child(self._provider(provider), before, after)

    def _provider(self, name: str) -> str:
        return name if not name or name in self._providers else OTHER

    def _model(self, name: str) -> str:
        if not name or name in self._model_labels:
            return name
        if name in self._models and len(self._model_labels) < MODEL_LABELS:
            self._model_labels.add(name)
            return name
        return OTHER

    # -- exposition --------------------------------------------------------------------------

    def read(self) -> None:
        """Bring the gauges up to date that are read only when somebody asks."""
        for refresh in self.refresh:
            refresh()

    def by(self, name: str, label: str) -> dict[str, int]:
        """The counts of one metric, summed by one of its labels."""
        (family,) = (each for each in self._families if each.name == name)
        place = family.labels.index(label)
        sums: dict[str, int] = {}
        for values, child in family.children.items():
            assert isinstance(child, Count), name
            sums[values[place]] = sums.get(values[place], 0) + int(child.value)
        return sums

    def pages(self) -> Iterator[bytes]:
        """The text that Prometheus scrapes, in pieces between which others may do their work."""
        self.read()
        for family in self._families:
            every: tuple[Count | Spread, ...] = tuple(family.children.values())
            children = iter(every)
            head = family.head
            while page := "".join(child.lines() for child in islice(children, PAGE_SERIES)):
                yield (head + page).encode()
                head = ""
            if head:
                yield head.encode()
        yield generate_latest(self._process)

    def process(self) -> dict[str, float]:
        """What the kernel says of this process, by the names that every dashboard knows."""
        families = self._process.collect()
        return {sample.name: sample.value for family in families for sample in family.samples}

    def _counter(self, name: str, words: str, *labels: str) -> Family[Count]:
        return self._add(Family("counter", name, words, labels, Count))

    def _gauge(self, name: str, words: str, *labels: str) -> Family[Count]:
        return self._add(Family("gauge", name, words, labels, Count))

    def _spread(
        self, name: str, words: str, bounds: Sequence[float], *labels: str
    ) -> Family[Spread]:
        def make(name: str, labels: str) -> Spread:
            return Spread(name, labels, bounds)

        return self._add(Family("histogram", name, words, labels, make))

    def _add(self, family: Family[Child]) -> Family[Child]:
        self._families.append(family)
        return family
