"""The gateway's side, for the running server: what its log said when it was last reconciled.

Read from the book that `gwproxy reconcile` leaves beside the database; nothing here writes.
"""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from gwproxy.storage import reconcile as books
from gwproxy.storage.gateway_sums import Sum
from gwproxy.storage.reconcile import BookRefused

_NEVER: Final = (0, 0)


class GatewaySide:
    def __init__(self, database: Path) -> None:
        self._path = books.beside(database)
        self._seen = _NEVER
        self._last: dict[str, Any] | None = None

    def last(self) -> dict[str, Any] | None:
        """The summary of the last run; read again only when the file has changed."""
        try:
            found = self._path.stat()
        except OSError:
            return None
        seen = (found.st_mtime_ns, found.st_size)
        if seen != self._seen:
            try:
                self._last = books.last_run(self._path)
            except BookRefused:
                return self._last  # somebody is at it: another time
            self._seen = seen
        return self._last

    async def by_model(self, first_day: int, last_day: int) -> Mapping[tuple[str, str], Sum]:
        """What the log says of each provider and model over days, both included."""
        try:
            found = await asyncio.to_thread(books.sums, self._path, first_day, last_day)
        except BookRefused:
            return {}
        return {(one.provider, one.model): one for one in found}

    async def by_provider(self, first_day: int, last_day: int) -> Mapping[str, Sum]:
        sums: dict[str, Sum] = {}
        for (provider, _), one in (await self.by_model(first_day, last_day)).items():
            before = sums.get(provider)
            sums[provider] = one if before is None else before.plus(one)
        return sums
