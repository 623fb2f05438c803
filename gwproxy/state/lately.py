"""The requests of the last minute before the start: what limits of so many a minute go on from."""

from collections.abc import Iterable
from typing import Final

from gwproxy.core.ledger import VOID, State
from gwproxy.core.limits import WINDOW_S, limits_of
from gwproxy.core.records import AnyRecord, Reserve, Settle, Tokens
from gwproxy.state.keyring import Keyring
from gwproxy.state.rates import Rates

WINDOW_MS: Final = int(WINDOW_S * 1000)


class Lately:
    """Collected while the state is put together; `replay` counts it."""

    def __init__(self, now_ms: int) -> None:
        self.since_ms = now_ms - WINDOW_MS
        self._seen: dict[int, tuple[int, str, int]] = {}
        """When, whose key, and the tokens, by reservation."""

    def stored(self, rows: Iterable[tuple[int, int, str, int]], state: State) -> None:
        """What the database has of settled requests, as `storage.reports.admitted_since` gives it,
        and what was open then."""
        for lsn, t, key_id, tokens in rows:
            self._seen[lsn] = t, key_id, tokens
        for hold in state.holds.values():
            self.saw(hold.reserve)

    def saw(self, record: AnyRecord) -> None:
        """A record that the database does not have yet."""
        if isinstance(record, Reserve):
            if record.t > self.since_ms:
                self._seen[record.lsn] = record.t, record.key_id, record.prompt + (record.max or 0)
        elif isinstance(record, Settle) and record.r in self._seen:
            if record.outcome == VOID:
                del self._seen[record.r]
            else:
                t, key_id, _ = self._seen[record.r]
                self._seen[record.r] = t, key_id, total(record.tokens)

    def replay(self, rates: Rates, keyring: Keyring, now_ms: int, now: float) -> None:
        """Count them where something limits them now. `now` is of the clock of `rates`."""
        for lsn in sorted(self._seen):
            t, key_id, tokens = self._seen[lsn]
            key = keyring.key(key_id)
            user = keyring.user(key.user_id) if key is not None else None
            if key is not None and user is not None:
                limits = limits_of(key, user)
                rates.replay(now - (now_ms - t) / 1000, limits, tokens)
        self._seen.clear()


def total(tokens: Tokens) -> int:
    """What counts against a limit; the reasoning is part of the output."""
    return sum(tokens[:4])
