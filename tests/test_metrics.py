"""What Prometheus is told: the names that are a contract, closed labels, and lawful text."""

import shutil
import subprocess
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from gwproxy import __version__
from gwproxy.metrics import (
    CONTENT_TYPE,
    ERROR_TYPES,
    MODEL_LABELS,
    PAGE_SERIES,
    TOKEN_KINDS,
    Metrics,
)
from tests.conftest import Front
from tests.harness import ADMIN, chat
from tests.scene import until

# Every name that there is or will be, with its labels and its kind.
CONTRACT = {
    "gwproxy_requests_total": ("route", "provider", "model", "status_class", "error_type"),
    "gwproxy_overhead_seconds": (),
    "gwproxy_upstream_ttfb_seconds": ("provider",),
    "gwproxy_stream_gap_seconds": (),
    "gwproxy_streams_open": (),
    "gwproxy_tokens_total": ("provider", "model", "type", "source"),
    "gwproxy_cost_usd_total": ("provider", "model"),
    "gwproxy_held_usd": (),
    "gwproxy_holds_open": (),
    "gwproxy_hold_oldest_seconds": (),
    "gwproxy_settlements_total": ("outcome",),
    "gwproxy_overruns_total": (),
    "gwproxy_quota_refusals_total": ("scope",),
    "gwproxy_fallbacks_total": ("from", "to", "reason"),
    "gwproxy_provider_attempts_total": ("provider", "outcome"),
    "gwproxy_candidates_skipped_total": ("provider", "reason"),
    "gwproxy_breaker_state": ("provider",),
    "gwproxy_breaker_transitions_total": ("provider", "from", "to"),
    "gwproxy_storage_state": (),
    "gwproxy_degraded_exposure_usd": (),
    "gwproxy_ledger_commit_seconds": (),
    "gwproxy_ledger_queue": (),
    "gwproxy_reconcile_drift_usd": (),
    "gwproxy_reconcile_lines": ("kind",),
    "gwproxy_loop_stall_seconds": (),
    "gwproxy_tokenizer_fallback": (),
    "gwproxy_token_ratio": ("model", "text"),
    "gwproxy_token_ratio_error": ("model", "text"),
    "gwproxy_budget_alerts_total": ("scope", "threshold"),
    "gwproxy_auth_failures_total": (),
    "gwproxy_journal_bytes": (),
    "gwproxy_journal_state": (),
    "gwproxy_journal_segments_missing": (),
    "gwproxy_build_info": ("version", "python"),
    "gwproxy_log_lines_dropped_total": (),
    "gwproxy_last_backup_timestamp_seconds": (),
    "process_start_time_seconds": (),
    "process_resident_memory_bytes": (),
    "process_open_fds": (),
    "process_max_fds": (),
    "process_cpu_seconds_total": (),
    "process_virtual_memory_bytes": (),
}
FROM_THE_START = {
    *("gwproxy_overhead_seconds", "gwproxy_stream_gap_seconds", "gwproxy_streams_open"),
    *("gwproxy_holds_open", "gwproxy_auth_failures_total", "gwproxy_tokenizer_fallback"),
    *("gwproxy_loop_stall_seconds", "gwproxy_build_info", "gwproxy_held_usd"),
    *("gwproxy_hold_oldest_seconds", "gwproxy_overruns_total", "gwproxy_storage_state"),
    *("gwproxy_journal_state", "gwproxy_journal_bytes", "gwproxy_ledger_queue"),
    *("gwproxy_ledger_commit_seconds", "gwproxy_log_lines_dropped_total"),
    *("gwproxy_last_backup_timestamp_seconds", "gwproxy_journal_segments_missing"),
    *("process_start_time_seconds", "process_resident_memory_bytes", "process_open_fds"),
}
MOMENTS = {
    "gwproxy_hold_oldest_seconds",
    "process_start_time_seconds",
    "gwproxy_last_backup_timestamp_seconds",
}
KINDS = {"total": "counter", "seconds": "histogram"}

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def rendered(metrics: Metrics) -> bytes:
    return b"".join(metrics.pages())


def families(text: bytes | Metrics) -> dict[str, Metric]:
    raw = rendered(text) if isinstance(text, Metrics) else text
    parsed = list(text_string_to_metric_families(raw.decode()))
    names = [name_of(family) for family in parsed]
    assert len(names) == len(set(names))
    return dict(zip(names, parsed, strict=True))


def name_of(family: Metric) -> str:
    """The parser takes the ending off a counter's name."""
    return f"{family.name}_total" if family.type == "counter" else family.name


def samples(found: Iterable[Metric]) -> Samples:
    out: Samples = {}
    for family in found:
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in out
            out[key] = sample.value
    return out


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return samples(families(metrics).values())[name, frozenset(labels.items())]


def new() -> Metrics:
    return Metrics(frozenset({"openai", "gemini"}), frozenset({"gpt-4o", "gemini-2.5-pro"}))


def used() -> Metrics:
    """Each family with a sample at least."""
    metrics = new()
    for error_type in ERROR_TYPES:
        metrics.request("chat", "openai", "gpt-4o", 200, error_type).value += 1
    metrics.ttfb("openai").observe(0.2)
    metrics.settled("openai", "gpt-4o", "provider", (5, 1, 2, 7, 3), 0.25)
    metrics.settlement("completed").value += 1
    metrics.fallback("openai", "gemini", "status_5xx").value += 1
    metrics.provider_attempt("openai", "success").value += 1
    metrics.skipped("openai", "breaker open").value += 1
    metrics.breaker_state("openai").value = 2
    metrics.breaker_transition("openai", "closed", "open").value += 1
    metrics.quota_refusal("user").value += 1
    metrics.budget_alert("org", 80).value += 1
    metrics.overhead.observe(0.0002)
    metrics.stream_gap.observe(0.3)
    metrics.loop_stall.observe(0.0)
    metrics.ledger_commit.observe(0.002)
    metrics.token_ratio("answer", "gpt-4o", 1.02, 0.1)
    metrics.token_ratio("answer", "made-up", 3.0, 0.1)
    metrics.reconciled(0.5, {"equal": 3})
    return metrics


def test_every_name_and_its_labels_are_as_agreed() -> None:
    found = families(used())
    assert found.keys() <= CONTRACT.keys()
    for name, family in found.items():
        assert family.documentation.endswith(".")
        ending = name.rpartition("_")[2]
        kind = "gauge" if name in MOMENTS else KINDS.get(ending, "gauge")
        assert family.type == kind, name
        assert family.samples, f"{name} has no sample"
        for sample in family.samples:
            labels = tuple(label for label in sample.labels if label != "le")
            if CONTRACT[name] is not ...:
                assert sorted(labels) == sorted(CONTRACT[name])


def test_what_has_no_labels_is_there_from_the_start() -> None:
    found = families(new())
    for name in FROM_THE_START:
        assert found[name].samples, name
    for (name, _), number in samples(found.values()).items():
        if not name.startswith("process_"):
            assert number == (1 if name == "gwproxy_build_info" else 0)
    assert found["gwproxy_build_info"].samples[0].labels["version"] == __version__


def test_the_error_types_are_a_closed_set() -> None:
    assert {error_type for error_type in ERROR_TYPES if error_type} == {
        *("caller_invalid", "caller_auth", "caller_cancelled"),
        *("policy_quota", "policy_rate", "policy_model"),
        *("provider_auth", "provider_rate_limited", "provider_overloaded", "provider_error"),
        *("provider_timeout", "provider_connect", "provider_truncated"),
        *("gateway_storage", "gateway_internal", "other"),
    }
    with pytest.raises(AssertionError):
        new().request("chat", "openai", "gpt-4o", 200, "made_up")


@pytest.mark.parametrize(
    ("status", "status_class"), [(200, "2xx"), (404, "4xx"), (499, "4xx"), (503, "5xx")]
)
def test_a_status_is_told_by_its_class(status: int, status_class: str) -> None:
    metrics = new()
    metrics.request("chat", "openai", "gpt-4o", status, "other").value += 1
    labels = {"route": "chat", "provider": "openai", "model": "gpt-4o", "error_type": "other"}
    assert value(metrics, "gwproxy_requests_total", **labels, status_class=status_class) == 1


# -- labels ----------------------------------------------------------------------------------------


def test_a_provider_or_a_model_that_nobody_configured_is_other() -> None:
    metrics = new()
    for provider, model in (("nobody", "made-up"), ("x\ny", 'q"uote'), ("", "")):
        metrics.request("chat", provider, model, 200, "").value += 1
        metrics.ttfb(provider).observe(1)
        metrics.settled(provider, model, "counted", (1, 0, 0, 1, 0), 0.5)
        metrics.fallback(provider, "openai", "reset").value += 1
    text = rendered(metrics).decode()
    for word in ("nobody", "made-up", "uote", "x\\ny"):
        assert word not in text
    assert value(metrics, "gwproxy_cost_usd_total", provider="other", model="other") == 1
    assert value(metrics, "gwproxy_cost_usd_total", provider="", model="") == 0.5
    assert (
        value(metrics, "gwproxy_fallbacks_total", to="openai", reason="reset", **{"from": "other"})
        == 2
    )


def test_the_distinct_models_are_bounded() -> None:
    every = [f"model-{number}" for number in range(3 * MODEL_LABELS)]
    metrics = Metrics(frozenset({"openai"}), frozenset(every))
    for model in (*every, *every):
        metrics.request("chat", "openai", model, 200, "").value += 1
        metrics.settled("openai", model, "provider", (1, 1, 1, 1, 1), 1.0)
    found = families(metrics)
    for name in ("gwproxy_requests_total", "gwproxy_tokens_total", "gwproxy_cost_usd_total"):
        models = {sample.labels["model"] for sample in found[name].samples}
        assert models == {*every[:MODEL_LABELS], "other"}
    # Those that came first keep their own rows, and nothing is lost of the others.
    assert value(metrics, "gwproxy_cost_usd_total", provider="openai", model="model-0") == 2
    assert value(metrics, "gwproxy_cost_usd_total", provider="openai", model="other") == (
        4 * MODEL_LABELS
    )


def test_names_that_callers_make_up_take_no_memory_without_bound() -> None:
    metrics = new()
    for number in range(20_000):
        metrics.request("chat", f"p{number}", f"m{number}", 200, "").value += 1
        metrics.settled(f"p{number}", f"m{number}", "counted", (1, 0, 0, 1, 0), 0.0)
    remembered = [vars(metrics)[name] for name in ("_per_request", "_per_settlement")]
    assert all(len(table) <= 4096 for table in remembered)
    labels = {"route": "chat", "provider": "other", "model": "other", "error_type": ""}
    assert value(metrics, "gwproxy_requests_total", **labels, status_class="2xx") == 20_000
    assert len(rendered(metrics)) < 20_000


# -- numbers ---------------------------------------------------------------------------------------

BOUNDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1)


@given(
    st.lists(
        st.one_of(
            st.floats(0, 1), st.sampled_from(BOUNDS), st.floats(0, 1e6), st.sampled_from([0, 1e-9])
        )
    )
)
def test_a_histograms_buckets_add_up(observed: list[float]) -> None:
    metrics = new()
    for number in observed:
        metrics.overhead.observe(number)
    (family,) = (f for n, f in families(metrics).items() if n == "gwproxy_overhead_seconds")
    buckets = {s.labels["le"]: s.value for s in family.samples if s.name.endswith("_bucket")}
    assert tuple(float(le) for le in buckets) == (*BOUNDS, float("inf"))
    for le, number in buckets.items():
        assert number == sum(one <= float(le) for one in observed)
    assert list(buckets.values()) == sorted(buckets.values())
    (count,) = (s.value for s in family.samples if s.name.endswith("_count"))
    (total,) = (s.value for s in family.samples if s.name.endswith("_sum"))
    assert buckets["+Inf"] == count == len(observed)
    assert total == pytest.approx(sum(observed))


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["openai", "gemini", "nobody"]),
        st.sampled_from(["gpt-4o", "gemini-2.5-pro", "made-up"]),
        st.sampled_from(["provider", "counted", "estimated"]),
        st.tuples(*[st.integers(0, 10**6)] * 5),
        st.floats(0, 100),
    ),
    max_size=10,
)


@settings(deadline=None)
@given(STEPS)
def test_no_counter_ever_falls(
    steps: list[tuple[str, str, str, tuple[int, ...], float]],
) -> None:
    metrics = new()
    before: Samples = {}
    for provider, model, source, tokens, usd in steps:
        metrics.request("chat", provider, model, 200, "").value += 1
        metrics.settled(provider, model, source, tokens, usd)
        metrics.settlement("completed").value += 1
        metrics.ttfb(provider).observe(usd)
        found = families(metrics)
        after = samples(f for f in found.values() if f.type != "gauge")
        assert after.keys() >= before.keys()
        assert all(after[key] >= number for key, number in before.items())
        before = after
    kinds: dict[str, float] = {}
    for (name, labels), number in before.items():
        if name == "gwproxy_tokens_total":
            kind = dict(labels)["type"]
            kinds[kind] = kinds.get(kind, 0) + number
    for position, kind in enumerate(TOKEN_KINDS):
        assert kinds.get(kind, 0) == sum(step[3][position] for step in steps)


# -- a scrape among streams --


def test_a_scrape_of_thousands_of_series_lets_others_in_between() -> None:
    models = [f"model-{number}" for number in range(MODEL_LABELS)]
    metrics = Metrics(frozenset({"openai", "gemini"}), frozenset(models))
    for model in models:
        for provider in ("openai", "gemini"):
            for source in ("provider", "counted"):
                metrics.settled(provider, model, source, (1, 2, 3, 4, 5), 0.25)
            for status in (200, 400, 500):
                metrics.request("chat", provider, model, status, "other").value += 1
    pages = list(metrics.pages())
    lines = [page.count(b"\n") for page in pages]
    assert sum(lines) > 5_000
    assert max(lines) <= PAGE_SERIES + 2  # and what the metric is
    assert len(samples(families(b"".join(pages)).values())) > 5_000


def test_a_series_that_comes_into_being_during_a_scrape_does_not_disturb_it() -> None:
    metrics = used()
    seen = b""
    for number, page in enumerate(metrics.pages()):
        seen += page
        metrics.settlement(f"outcome-{number}").value += 1
        metrics.overhead.observe(0.1)
    families(seen)


# The parser, unlike Prometheus, takes more than a line feed for the end of a line.
LABELS = st.text(
    st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"], include_characters="\n")
)


@given(LABELS)
def test_whatever_stands_in_a_label_is_read_back_as_it_was(text: str) -> None:
    metrics = new()
    metrics.settlement(text).value += 1
    assert value(metrics, "gwproxy_settlements_total", outcome=text) == 1


# -- as Prometheus reads it ------------------------------------------------------------------------


def test_prometheus_own_tool_accepts_it() -> None:
    promtool = shutil.which("promtool", path="/usr/bin:/usr/local/bin")
    if promtool is None:
        pytest.skip("promtool comes with Prometheus, which this machine does not have")
    checked = subprocess.run(
        [promtool, "check", "metrics"], input=rendered(used()), capture_output=True, check=False
    )
    assert checked.returncode == 0, checked.stderr.decode()


async def test_a_running_gateway_is_scraped_by_those_who_may(front: Front) -> None:
    for body in (chat(), chat(stream=True)):
        answer = await front.chat(body)
        assert answer.status == 200
        await answer.read()
    assert front.gateway.app is not None
    writer = front.gateway.app._store.writer
    await until(lambda: writer.applied >= 4, 10)  # a moment behind
    assert (await front.client.get("/metrics")).status == 401
    app = front.gateway.app
    assert app is not None
    await until(lambda: app._store.writer.applied > 0)  # the database's first commit
    scraped = await front.client.get("/metrics", headers=ADMIN)
    assert scraped.status == 200
    assert scraped.headers["Content-Type"] == CONTENT_TYPE
    text = await scraped.read()
    found = families(text)
    assert found.keys() <= CONTRACT.keys()
    for secret in (front.key, "alice", "Hello"):
        assert secret.encode() not in text
    numbers = samples(found.values())
    chats = {
        key: number
        for key, number in numbers.items()
        if key[0] == "gwproxy_requests_total" and ("route", "chat") in key[1]
    }
    assert sum(chats.values()) == 2
    assert numbers["gwproxy_holds_open", frozenset()] == 0
    assert numbers["gwproxy_streams_open", frozenset()] == 0
    assert numbers["gwproxy_settlements_total", frozenset({("outcome", "completed")})] == 2
    assert numbers["gwproxy_overhead_seconds_count", frozenset()] == 2
    assert numbers["gwproxy_ledger_commit_seconds_count", frozenset()] > 0
    # The answer and its stream used 11 tokens in and 2 out, at 1 and 2 dollars a million.
    cost = sum(number for key, number in numbers.items() if key[0] == "gwproxy_cost_usd_total")
    assert cost == pytest.approx(2 * 15e-6)


async def test_a_scrape_needs_no_key_where_the_operator_says_so(start_gateway: object) -> None:
    front = await start_gateway("[metrics]\nopen = true")
    assert (await front.client.get("/metrics")).status == 200
