"""How a command asks the admin plane.

A running server is asked over its admin API, since the database is its alone; without one the store
is opened here, under the same locks, and the same code checks and changes it.
"""

import argparse
import asyncio
import getpass
import os
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any, Final, Protocol
from urllib.parse import urlencode, urlsplit

import msgspec
import orjson

from gwproxy.admin import ask as asked
from gwproxy.admin import body as checked
from gwproxy.admin.ask import Route
from gwproxy.admin.body import MOST_PER_PAGE, Page
from gwproxy.admin.bulk import Bulk, ExportQuery, ImportQuery
from gwproxy.admin.routes import ask_directly
from gwproxy.admin.rows import MEDIA_TYPES, Format
from gwproxy.cli.offline import opened
from gwproxy.cli.printing import print_json, say
from gwproxy.config import Config, ConfigError, Listen, find_config, load
from gwproxy.core.errors import GatewayError
from gwproxy.core.identity import is_id
from gwproxy.core.routing import CATALOGUE
from gwproxy.log import Log
from gwproxy.parts import admin_plane
from gwproxy.state.directory import Author
from gwproxy.state.store import Store
from gwproxy.storage.database import DatabaseInUse, DatabaseRefused, lock
from gwproxy.storage.segments import JournalInUse, JournalRefused

FINE: Final = 0
REFUSED: Final = 1
WRONG_USAGE: Final = 2
UNREACHABLE: Final = 3

_TIMEOUT_S: Final = 30.0
_IMPORT_S: Final = 600.0
"""So long may the rows of an import take after the last of them was sent."""
_LONGEST_ANSWER_BYTES: Final = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Ask:
    """One call of the admin plane. `path` is what follows `/admin/`."""

    method: str
    path: tuple[str, ...]
    body: bytes = b""
    page: Page | None = None
    query: tuple[tuple[str, str], ...] = ()


class Call(Protocol):
    """The admin plane, wherever it is."""

    async def __call__(self, ask: Ask) -> dict[str, Any]: ...

    def export(self, query: dict[str, str]) -> AsyncIterator[bytes]: ...

    async def load(
        self, data: Callable[[], AsyncIterator[bytes]], form: Format, query: dict[str, str]
    ) -> dict[str, Any]:
        """Import what `data` gives; the report."""


Command = Callable[[argparse.Namespace, Call], Awaitable[int]]


class Stop(Exception):
    """The command ends here, with this exit code and these words."""

    def __init__(self, code: int, words: str) -> None:
        super().__init__(words)
        self.code = code


class Unknown(Stop):
    """A server's 404."""


class Unauthorized(Stop):
    """A server's 401: it has another admin key than the configuration that is read here."""


# -- what the families share ---------------------------------------------------------------------


def common_arguments() -> argparse.ArgumentParser:
    """What every command takes that asks the admin plane."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--config", metavar="FILE", help="default: $GWPROXY_CONFIG, ./config.toml")
    common.add_argument("--url", help="the server's admin address, where the configuration's fails")
    common.add_argument("--json", action="store_true", help="print JSON")
    return common


def family(
    subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, words: str
) -> "argparse._SubParsersAction[argparse.ArgumentParser]":
    return subparsers.add_parser(name, help=words).add_subparsers(metavar="COMMAND", required=True)


def add_list(
    family: "argparse._SubParsersAction[argparse.ArgumentParser]",
    common: argparse.ArgumentParser,
    command: Command,
) -> argparse.ArgumentParser:
    parser = family.add_parser("list", parents=[common], help="list them")
    parser.add_argument("--deleted", action="store_true", help="deleted and revoked ones too")
    parser.set_defaults(func=runs(command))
    return parser


# -- how a command runs --------------------------------------------------------------------------


def runs(command: Command, *, of_server: bool = False) -> Callable[[argparse.Namespace], int]:
    """`of_server`: it means nothing without a running one."""

    def run(args: argparse.Namespace) -> int:
        try:
            config = load(
                find_config(args.config, os.environ), os.environ, catalogue=CATALOGUE, local=True
            )
            return asyncio.run(_run(args, config, command, of_server))
        except ConfigError as error:
            say(str(error))
            return WRONG_USAGE
        except (DatabaseRefused, JournalRefused) as error:
            say(str(error))
            return REFUSED
        except GatewayError as error:
            say(error.message)
            return _exit_code(error.status)
        except Stop as stop:
            say(str(stop))
            return stop.code

    return run


async def _run(args: argparse.Namespace, config: Config, command: Command, of_server: bool) -> int:
    if of_server or args.url is not None:
        return await command(args, _Server(config, args.url))
    try:
        async with opened(config) as store:
            return await command(args, _Here(store, admin_plane(config, store, Log(sys.stderr))))
    except (DatabaseInUse, JournalInUse) as in_use:
        # Its owner is the server, as a rule: whoever holds the lock is the one to be asked.
        try:
            return await command(args, _Server(config, None))
        except Stop as stop:
            if stop.code == UNREACHABLE:
                words = f"{in_use.fact} {_WAIT_FOR_IT}"
                if _is_free(config):
                    words = "It has ended since this command began: run the command again."
                raise Stop(UNREACHABLE, f"{stop} {words}") from in_use
            raise


_WAIT_FOR_IT: Final = (
    "A server that is still starting answers soon, and another command ends: wait a moment and try "
    "again. A server that listens elsewhere is named by --url."
)


def _is_free(config: Config) -> bool:
    try:
        os.close(lock(config.storage.path))
    except (DatabaseInUse, DatabaseRefused):
        return False
    return True


def _exit_code(status: int) -> int:
    # 401 and 403: the configured admin key is wrong. 400: so is an argument.
    return WRONG_USAGE if status in (400, 401, 403) else REFUSED


# -- without a server ----------------------------------------------------------------------------


class _Here:
    def __init__(self, store: Store, table: Sequence[Route]) -> None:
        self._bulk = Bulk(store)
        self._table = table
        self._author = Author(f"cli:{getpass.getuser()}")

    async def __call__(self, ask: Ask) -> dict[str, Any]:
        answer = await ask_directly(
            self._table,
            ask.method,
            "/admin/" + "/".join(ask.path),
            query=_parameters(ask),
            body=ask.body,
            ask=asked.Ask(self._author),
        )
        found: dict[str, Any] = msgspec.to_builtins(answer.value or {})
        return found

    def export(self, query: dict[str, str]) -> AsyncIterator[bytes]:
        return self._bulk.dump(checked.query(query.items(), ExportQuery))

    async def load(
        self, data: Callable[[], AsyncIterator[bytes]], form: Format, query: dict[str, str]
    ) -> dict[str, Any]:
        wanted = checked.query(query.items(), ImportQuery)
        outcome = await self._bulk.load(data(), form, wanted, self._author)
        found: dict[str, Any] = orjson.loads(b"".join(outcome.json()))
        return found


def _parameters(ask: Ask) -> list[tuple[str, str]]:
    page = ask.page
    if page is None:
        return [*ask.query]
    return [
        *ask.query,
        ("limit", str(page.limit)),
        ("cursor", page.cursor),
        ("deleted", str(int(page.deleted))),
    ]


# -- of a running server -------------------------------------------------------------------------


class _Server:
    """A connection for each question, since a command has one or two; blocking, since nothing else
    happens in this process."""

    def __init__(self, config: Config, url: str | None) -> None:
        if config.admin.key is None:
            raise Stop(
                WRONG_USAGE,
                "The running server has to be asked, and there is no admin key to ask it with: "
                "set GWPROXY_ADMIN_KEY as the server has it.",
            )
        self._authorization = f"Bearer {config.admin.key.reveal()}"
        self._listen = config.admin.listen or config.server.listen
        self._url = url

    async def __call__(self, ask: Ask) -> dict[str, Any]:
        if not all(is_id(part) for part in ask.path):
            raise Stop(WRONG_USAGE, "An id has 1 to 64 characters out of A-Z, a-z, 0-9, _ and -.")
        headers = {"Content-Type": "application/json"} if ask.body else {}
        connection, place = _connection(self._listen, self._url)
        with closing(connection):
            answer = self._send(
                connection, place, ask.method, ask.path, _parameters(ask), headers, ask.body
            )
            return _understood(answer.status, _rest(answer, place), place)

    async def export(self, query: dict[str, str]) -> AsyncIterator[bytes]:
        connection, place = _connection(self._listen, self._url)
        with closing(connection):
            answer = self._send(connection, place, "GET", ("export",), query.items(), {}, b"")
            if answer.status != 200:
                _understood(answer.status, _rest(answer, place), place)
            while part := _part(answer, place):
                yield part

    async def load(
        self, data: Callable[[], AsyncIterator[bytes]], form: Format, query: dict[str, str]
    ) -> dict[str, Any]:
        connection, place = _connection(self._listen, self._url)
        target = f"/admin/import?{urlencode(query)}"
        with closing(connection):
            try:
                connection.connect()
            except (OSError, HTTPException) as error:
                raise Stop(UNREACHABLE, f"No server answers at {place}: {error}.") from error
            try:
                with suppress(BrokenPipeError, ConnectionResetError):
                    # Refused before its end: the answer says why.
                    await self._upload(connection, target, form, data())
                connection.sock.settimeout(_IMPORT_S)
                answer = connection.getresponse()
                raw = answer.read(_LONGEST_ANSWER_BYTES)
            except (OSError, HTTPException) as error:
                raise Stop(
                    UNREACHABLE,
                    f"{place} broke off before it answered: {error}. All of the file was imported, "
                    "or nothing; it is safe to send it again, for what is there already stays as "
                    "it is.",
                ) from error
            # A report of what is wrong in which row is an answer, not an error.
            return _understood(200 if b'"rows":[' in raw else answer.status, raw, place)

    async def _upload(
        self, connection: HTTPConnection, target: str, form: Format, data: AsyncIterator[bytes]
    ) -> None:
        connection.putrequest("POST", target)
        connection.putheader("Authorization", self._authorization)
        connection.putheader("Content-Type", MEDIA_TYPES[form])
        connection.putheader("Transfer-Encoding", "chunked")
        connection.endheaders()
        async for part in data:
            connection.send(b"%x\r\n%b\r\n" % (len(part), part))
        connection.send(b"0\r\n\r\n")

    def _send(
        self,
        connection: HTTPConnection,
        place: str,
        method: str,
        path: tuple[str, ...],
        query: Any,
        headers: dict[str, str],
        body: bytes,
    ) -> HTTPResponse:
        target = "/admin/" + "/".join(path)
        if query := list(query):
            target += f"?{urlencode(query)}"
        headers = {"Authorization": self._authorization, **headers}
        try:
            connection.request(method, target, body or None, headers)
            return connection.getresponse()
        except (OSError, HTTPException) as error:
            raise Stop(UNREACHABLE, f"No server answers at {place}: {error}.") from error


def _rest(answer: HTTPResponse, place: str) -> bytes:
    try:
        return answer.read(_LONGEST_ANSWER_BYTES)
    except (OSError, HTTPException) as error:
        raise Stop(UNREACHABLE, f"{place} broke off its answer: {error}.") from error


def _part(answer: HTTPResponse, place: str) -> bytes:
    try:
        return answer.read1(1 << 16)
    except (OSError, HTTPException) as error:
        raise Stop(UNREACHABLE, f"{place} broke off its answer: {error}.") from error


def _understood(status: int, raw: bytes, place: str) -> dict[str, Any]:
    if status == 204:
        return {}
    try:
        answer = orjson.loads(raw)
        if status in (200, 201) and isinstance(answer, dict):
            return answer
        words = str(answer["error"]["message"])
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise Stop(
            UNREACHABLE, f"What answers at {place} is not gwproxy (status {status})."
        ) from error
    raise {401: Unauthorized, 404: Unknown}.get(status, Stop)(_exit_code(status), words)


def _connection(listen: Listen, url: str | None) -> tuple[HTTPConnection, str]:
    """A connection that is not open yet, and the words for where it goes."""
    if url is not None:
        return _connection_to(url), url
    if listen.kind == "unix":
        return _UnixConnection(listen.path), f"unix:{listen.path}"
    if listen.kind == "fd" or listen.port == 0:
        raise Stop(
            WRONG_USAGE, f'The configuration says "{listen}": name the server\'s address by --url.'
        )
    # What listens on every address is reached on this machine's own.
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(listen.host, listen.host)
    return HTTPConnection(host, listen.port, timeout=_TIMEOUT_S), str(listen)


def _connection_to(url: str) -> HTTPConnection:
    wrong = Stop(WRONG_USAGE, '--url must be an address such as "http://127.0.0.1:8081".')
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise wrong from error
    if parts.scheme not in ("http", "https") or not host or parts.path not in ("", "/"):
        raise wrong
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    return kind(host, port, timeout=_TIMEOUT_S)


class _UnixConnection(HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(_TIMEOUT_S)
        self.sock.connect(self._path)


# -- printing ------------------------------------------------------------------------------------


def print_one(args: argparse.Namespace, row: dict[str, Any]) -> None:
    if args.json:
        print_json(row)
        return
    width = max(map(len, row))
    for name, value in row.items():
        print(f"{name:<{width}}  {_cell(name, value)}")


async def print_list(
    args: argparse.Namespace, call: Call, path: tuple[str, ...], columns: Sequence[str]
) -> None:
    rows: list[dict[str, Any]] = []
    cursor: str | None = ""
    while cursor is not None:
        part = Page(limit=MOST_PER_PAGE, cursor=cursor, deleted=args.deleted)
        page = await call(Ask("GET", path, page=part))
        rows += page["data"]
        cursor = page["next_cursor"]
    if args.json:
        print_json({"data": rows, "next_cursor": None})
        return
    print_rows(rows, columns)


def print_rows(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    cells = [[name.upper().replace("_", " ") for name in columns]]
    cells += [[_cell(name, row[name]) for name in columns] for row in rows]
    widths = [max(len(line[place]) for line in cells) for place in range(len(columns))]
    for line in cells:
        padded = (f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True))
        print("  ".join(padded).rstrip())


def _cell(name: str, value: object) -> str:
    if value is None or value in ([], ()):  # a list from a server, a tuple without one
        return "-"
    if isinstance(value, str):
        # Nine decimals are for programs; people get as many as say something, at least two.
        whole, point, fraction = value.partition(".")
        return f"{whole}.{fraction.rstrip('0'):0<2}" if point and name.endswith("_usd") else value
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    if isinstance(value, (dict, bool)):
        return orjson.dumps(value).decode()
    return str(value)
