"""The running process as the admin plane sees it: to take its configuration anew, to back up."""

from collections.abc import Awaitable, Callable

import msgspec

from gwproxy.admin.ask import Answer, Ask, Route
from gwproxy.config import ConfigError
from gwproxy.core.errors import InvalidRequest, StorageUnavailable
from gwproxy.storage.database import BackupRefused
from gwproxy.storage.ledger import Mark


class Reloaded(msgspec.Struct):
    needs_restart: list[str]
    """Settings that have changed and stay as they were until then."""


class BackedUp(msgspec.Struct):
    file: str
    as_of_lsn: int


class Process:
    def __init__(
        self,
        reload: Callable[[], Awaitable[list[str]]],
        back_up: Callable[[], Awaitable[tuple[str, Mark]]],
    ) -> None:
        self._reload = reload
        self._back_up = back_up

    def routes(self) -> tuple[Route, ...]:
        return (
            Route(
                method="POST",
                path="/admin/reload",
                do=self.reload,
                summary="Take the configuration as its file has it now, without dropping a stream.",
                answers=Reloaded,
            ),
            Route(
                method="POST",
                path="/admin/backup",
                do=self.back_up,
                summary="Back the database up into the journal's folder.",
                answers=BackedUp,
                status=201,
                refusals=(503,),
            ),
        )

    async def reload(self, ask: Ask) -> Answer:
        try:
            return Answer(Reloaded(await self._reload()))
        except ConfigError as error:
            raise InvalidRequest(str(error), code="invalid_configuration") from error

    async def back_up(self, ask: Ask) -> Answer:
        try:
            file, mark = await self._back_up()
        except BackupRefused as error:
            raise StorageUnavailable(str(error)) from error
        return Answer(BackedUp(file, mark.lsn))
