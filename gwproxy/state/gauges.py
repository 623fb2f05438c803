"""Gauges that are cheaper read than kept: looked up in what is known anyway, when somebody asks."""

from gwproxy.core.learned import Factors
from gwproxy.core.money import NANOS_PER_USD
from gwproxy.log import Log
from gwproxy.metrics import Metrics
from gwproxy.state.accounts import Accounts
from gwproxy.state.gateway_side import GatewaySide
from gwproxy.state.store import Store


def show_ledger(metrics: Metrics, store: Store, accounts: Accounts) -> None:
    state, journal = store.ledger.state, store.journal
    holds = state.holds.values()
    metrics.holds_open.value = len(holds)
    metrics.held.value = sum(hold.amount for hold in holds) / NANOS_PER_USD
    oldest = min((hold.reserve.t for hold in holds), default=None)
    now_ms = store.ledger.now_ms()
    metrics.hold_oldest.value = 0 if oldest is None else (now_ms - oldest) / 1000
    metrics.storage_state.value = store.lost
    exposure = accounts.exposure(state, store.ledger.periods()[1])
    metrics.degraded_exposure.value = exposure / NANOS_PER_USD
    metrics.journal_state.value = journal.lost is not None
    metrics.journal_bytes.value = journal.size_bytes()
    metrics.segments_missing.value = store.segments_missing
    metrics.last_backup_at.value = store.last_backup_at() or 0
    metrics.ledger_queue.value = state.lsn - store.writer.applied


def show_factors(metrics: Metrics, factors: Factors) -> None:
    for text, ratios in (("answer", factors.answers), ("prompt", factors.prompts)):
        for one in ratios:
            error = one.error_per_mille / 1000
            metrics.token_ratio(text, one.model, one.per_mille / 1000, error)


def show_log(metrics: Metrics, log: Log) -> None:
    metrics.log_lines_dropped.value = log.dropped


def show_reconciled(metrics: Metrics, side: GatewaySide) -> None:
    """How the last reconciliation came out, once there was one."""
    last = side.last()
    if last is not None:
        drift = sum(last["drift_nanos"].values()) / NANOS_PER_USD
        metrics.reconciled(drift, {name: kind["count"] for name, kind in last["kinds"].items()})
