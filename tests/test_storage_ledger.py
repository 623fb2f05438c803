"""The ledger's tables: what the writer makes of a journal, and what becomes of it when things fail."""

import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gwproxy.core.ledger import State, apply
from gwproxy.core.period import periods
from gwproxy.core.records import decode
from gwproxy.storage.ledger import LOADED_MS, load_state
from gwproxy.storage.verify import verify
from tests.ledgers import MOVES, Place, catch_up, no_breath, play, tables

moves = st.lists(
    st.tuples(st.sampled_from(MOVES), st.integers(0, 50), st.integers(0, 50)), max_size=60
)


def replayed(place: Place) -> State:
    """The whole journal, read back."""
    state = State()
    cursor = place.journal.find(0)
    while True:
        payloads, cursor = place.journal.read(cursor, 1000, 1 << 20)
        if not payloads:
            return state
        for payload in payloads:
            apply(state, decode(payload))


def figures(state: State, since: str = "") -> dict:
    """What a state knows, as values, but for balances of before `since` on which nothing is held."""
    return {
        "lsn": state.lsn,
        "t": state.t,
        "balances": {
            key: balance.figures()
            for key, balance in state.balances.items()
            if key[1] >= since or balance.held
        },
        "holds": {
            r: (h.reserve, h.attempt, h.holds, h.hidden, h.mark, h.tokens)
            for r, h in state.holds.items()
        },
        "alerts": {alert for alert in state.alerts if alert[1] >= since},
        "breakers": {
            name: (b.lsn, b.t, b.before, b.after, b.until, b.why)
            for name, b in state.breakers.items()
        },
        "idempotency": state.idempotency,
    }


@given(moves=moves, cuts=st.lists(st.integers(0, 60), max_size=4))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_any_history_in_any_batches_leads_to_the_same_rows(
    tmp_path_factory, moves, cuts
):
    """With restarts in between, as in one batch from the first record on; and all of it adds up."""
    place = await Place(tmp_path_factory.mktemp("one")).open()
    done = 0
    for cut in sorted(cuts):
        play(place.live, moves[done:cut])
        done = max(done, cut)
        await catch_up(place.writer())
    play(place.live, moves[done:])
    await catch_up(place.writer())
    assert place.heard == []
    assert await verify(place.database) == []

    fresh = await Place(tmp_path_factory.mktemp("two")).open()
    await fresh.database.commit(lambda c: c.execute("UPDATE organization SET created_at = 1"))
    await place.database.commit(lambda c: c.execute("UPDATE organization SET created_at = 1"))
    writer = place.writer(fresh.database)
    await catch_up(writer)
    assert await tables(fresh.database) == await tables(place.database)

    since = periods(place.live.state.t - LOADED_MS)[0]
    loaded = await load_state(place.database, breathe=no_breath)
    assert figures(loaded, since) == figures(place.live.state, since)
    assert figures(replayed(place)) == figures(place.live.state)
    await fresh.close()
    await place.close()
