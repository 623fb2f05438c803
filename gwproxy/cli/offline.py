"""The store, opened by a command while no server runs: under the same locks, by the same code."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from gwproxy.app import kept
from gwproxy.config import Config
from gwproxy.log import Log
from gwproxy.state.store import Store


@asynccontextmanager
async def opened(config: Config, *, accept_loss: bool = False) -> AsyncIterator[Store]:
    """DatabaseInUse or JournalInUse while a server has it."""
    log = Log(sys.stderr, "warning")
    log.start()
    try:
        store = None
        failure: BaseException | None = None
        async with asyncio.TaskGroup() as group:
            try:
                store = await Store.open(kept(config), group, log, accept_loss=accept_loss)
                yield store
            except BaseException as error:
                failure = error  # a group would wrap it
            finally:
                if store is not None:
                    await store.close()
        if failure is not None:
            raise failure
    finally:
        log.stop()
