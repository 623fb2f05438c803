"""Every Prometheus name, once. Labels come from closed sets; a user or a key is never one.

A metric's child is looked up once per combination and kept: `labels()` costs more than `inc()`.
"""

import functools
import platform

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from gwproxy import __version__

CONTENT_TYPE = CONTENT_TYPE_LATEST

OTHER = "other"

_OVERHEAD_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1)
_UPSTREAM_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_GAP_S = (0.01, 0.05, 0.1, 0.5, 1, 5, 15, 60)

ERROR_TYPES = frozenset(
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


MODEL_LABELS = 200
"""Distinct model labels. The price table knows thousands; each one is rows in every scrape."""


class Metrics:
    """One registry. `models` are the names that may become a label: configured or priced ones."""

    def __init__(self, providers: frozenset[str], models: frozenset[str]) -> None:
        self._providers = providers
        self._models = models
        self._model_labels: set[str] = set()
        self.registry = registry = CollectorRegistry()
        self._requests = Counter(
            "gwproxy_requests_total",
            "Requests answered.",
            ("route", "provider", "model", "status_class", "error_type"),
            registry=registry,
        )
        self.overhead = Histogram(
            "gwproxy_overhead_seconds",
            "Time from a request's head to its dispatch: what this proxy itself adds.",
            buckets=_OVERHEAD_S,
            registry=registry,
        )
        self._ttfb = Histogram(
            "gwproxy_upstream_ttfb_seconds",
            "Time from a request sent upstream to the first byte of its answer's body.",
            ("provider",),
            buckets=_UPSTREAM_S,
            registry=registry,
        )
        self.stream_gap = Histogram(
            "gwproxy_stream_gap_seconds",
            "The longest silence of the upstream within a stream.",
            buckets=_GAP_S,
            registry=registry,
        )
        self.streams_open = Gauge(
            "gwproxy_streams_open", "Streams being relayed at this moment.", registry=registry
        )
        self._tokens = Counter(
            "gwproxy_tokens_total",
            "Tokens by where the count came from (provider, counted or estimated).",
            ("provider", "model", "type", "source"),
            registry=registry,
        )
        self._cost = Counter(
            "gwproxy_cost_usd_total",
            "Cost of settled requests, in USD.",
            ("provider", "model"),
            registry=registry,
        )
        self._settlements = Counter(
            "gwproxy_settlements_total", "Requests settled.", ("outcome",), registry=registry
        )
        self.holds_open = Gauge(
            "gwproxy_holds_open", "Requests admitted and not yet settled.", registry=registry
        )
        self._fallbacks = Counter(
            "gwproxy_fallbacks_total",
            "Attempts that moved on to the next provider.",
            ("from", "to", "reason"),
            registry=registry,
        )
        self.auth_failures = Counter(
            "gwproxy_auth_failures_total", "Requests with no valid key.", registry=registry
        )
        self.tokenizer_fallback = Gauge(
            "gwproxy_tokenizer_fallback",
            "1 when tokens are estimated from bytes because the tokenizer failed its self-test.",
            registry=registry,
        )
        self.loop_stall = Histogram(
            "gwproxy_loop_stall_seconds",
            "How late the event loop's coarse timer fired.",
            buckets=(0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1),
            registry=registry,
        )
        Gauge(
            "gwproxy_build_info",
            "Always 1; the labels say what runs.",
            ("version", "python"),
            registry=registry,
        ).labels(__version__, platform.python_version()).set(1)

        # Bounded, because a caller has a say in some of the arguments.
        remember = functools.lru_cache(maxsize=4096)
        self.request = remember(self._request_child)
        """(route, provider, model, status, error_type) -> counter"""
        self.ttfb = remember(self._ttfb_child)
        """(provider) -> histogram"""
        self.tokens = remember(self._token_children)
        """(provider, model, source) -> the counters of input, cached, output and reasoning"""
        self.cost = remember(self._cost_child)
        """(provider, model) -> counter of USD"""
        self.settlement = remember(self._settlements.labels)
        """(outcome) -> counter"""
        self.fallback = remember(self._fallback_child)
        """(from, to, reason) -> counter"""

    def render(self) -> bytes:
        """The exposition text that Prometheus scrapes."""
        return generate_latest(self.registry)

    def _request_child(
        self, route: str, provider: str, model: str, status: int, error_type: str
    ) -> Counter:
        assert error_type in ERROR_TYPES, error_type
        return self._requests.labels(
            route,
            self._provider(provider),
            self._model(model),
            f"{status // 100}xx",
            error_type,
        )

    def _ttfb_child(self, provider: str) -> Histogram:
        return self._ttfb.labels(self._provider(provider))

    def _token_children(self, provider: str, model: str, source: str) -> tuple[Counter, ...]:
        labels = (self._provider(provider), self._model(model))
        return tuple(
            self._tokens.labels(*labels, kind, source)
            for kind in ("input", "cache_read", "cache_write", "output", "reasoning")
        )

    def _cost_child(self, provider: str, model: str) -> Counter:
        return self._cost.labels(self._provider(provider), self._model(model))

    def _fallback_child(self, old: str, new: str, reason: str) -> Counter:
        return self._fallbacks.labels(self._provider(old), self._provider(new), reason)

    def _provider(self, name: str) -> str:
        return name if not name or name in self._providers else OTHER

    def _model(self, name: str) -> str:
        if not name or name in self._model_labels:
            return name
        if name in self._models and len(self._model_labels) < MODEL_LABELS:
            self._model_labels.add(name)
            return name
        return OTHER
