"""The store, opened by a command while no server runs: under the same locks, by the same code."""

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from gwproxy.config import Config
from gwproxy.log import Log
from gwproxy.parts import kept
from gwproxy.state import store
from gwproxy.state.store import Store


@asynccontextmanager
async def opened(config: Config, *, accept_loss: bool = False) -> AsyncIterator[Store]:
    """DatabaseInUse or JournalInUse while a server has it."""
    log = Log(sys.stderr, "warning")
    log.start()
    try:
        async with store.opened(kept(config), log, accept_loss=accept_loss) as found:
            yield found
    finally:
        log.stop()
