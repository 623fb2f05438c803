"""One process: its loop, its handles on disk and database, and what it has built on them."""

from typing import Any

from gwproxy.state.accounts import Accounts
from gwproxy.state.books import Books
from gwproxy.state.ledger import Ledger
from gwproxy.state.store import Store
from gwproxy.storage.journal import Journal
from tests.simulator.database import PlayedDatabase
from tests.simulator.disk import DiskFiles
from tests.simulator.loop import Loop


class Life:
    """One process, from its start to its end."""

    def __init__(self, world: Any) -> None:
        self.world = world
        self.random = world.random
        self.loop = Loop(world.random, world.now_s)
        self.files = DiskFiles(
            world.disk, world.boot_id, world.point, self.loop.breathe, world.tempt
        )
        self.database: PlayedDatabase | None = None
        self.journal: Journal | None = None
        self.ledger: Ledger | None = None
        self.store: Store | None = None
        self.books: Books
        self.accounts: Accounts
        self.swapped = False

    def end(self) -> None:
        self.files.alive = False
        if self.database is not None:
            self.database.alive = False

    @property
    def lost(self) -> bool:
        return self.store is not None and self.store.lost
