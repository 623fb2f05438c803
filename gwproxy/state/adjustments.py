"""Adjustments: what an administrator adds to what an account may spend, or takes off what it has
spent. Each is an entry of the ledger with its author and reason, and nothing is ever deleted.
"""

from collections.abc import Awaitable, Callable

from gwproxy.core.errors import StorageUnavailable
from gwproxy.core.ledger import Key
from gwproxy.core.money import Nanos
from gwproxy.core.records import Adjust
from gwproxy.state.directory import Author
from gwproxy.state.ledger import Ledger, RecordUncertain
from gwproxy.state.repeats import Repeats


class Adjustments:
    """Of the month that it is now: its balances are all in memory."""

    def __init__(
        self, ledger: Ledger, repeats: Repeats, durable: Callable[[int], Awaitable[None]]
    ) -> None:
        self._ledger = ledger
        self._repeats = repeats
        self._durable = durable

    async def grant(self, account: str, amount: Nanos, reason: str, by: Author) -> None:
        """Let the account spend so much more this month."""
        await self._post(account, "grant", lambda key: amount, reason, by)

    async def reset(self, account: str, reason: str, by: Author) -> None:
        """Take off the account what it has spent this month; what is held stays held."""

        def spent(key: Key) -> int:
            balance = self._ledger.state.balances.get(key)
            return 0 if balance is None else -balance.spent

        await self._post(account, "reset", spent, reason, by)

    async def _post(
        self, account: str, kind: str, delta: Callable[[Key], int], reason: str, by: Author
    ) -> None:
        ledger = self._ledger
        if self._repeats.find(by.once) is None:
            ledger.admit()
            key = (account, ledger.periods()[0])
            record = Adjust(
                **ledger.stamp(),
                **by.fields(),
                accounts=(key,),
                delta=delta(key),
                type=kind,
                reason=reason,
            )
            try:
                ledger.post(record)
            except RecordUncertain as error:
                raise StorageUnavailable(_UNSURE, retry_after_s=error.retry_after_s) from error
            finally:
                # It counts also where nobody knows whether it was written.
                if by.once is not None and ledger.state.lsn == record.lsn:
                    self._repeats.remember(by.once, record.lsn, record.t, None)
        await self._durable(ledger.state.lsn)


_UNSURE = (
    "It counts, but it is not known whether it was recorded. Send it again under the same "
    "Idempotency-Key; without one, look at the usage first."
)
