"""`gwproxy users`, `gwproxy orgs` and `gwproxy keys`: the directory from the command line.

A running server is asked over its admin API, since the database is its alone; without one the
database is opened here, under the same lock, and the same code checks and changes it.
"""

import argparse
import asyncio
import getpass
import os
import socket
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any, Final
from urllib.parse import urlencode, urlsplit

import msgspec
import orjson

from gwproxy.admin import ask as asked
from gwproxy.admin.ask import Route
from gwproxy.admin.body import MOST_PER_PAGE, Page
from gwproxy.admin.routes import ask_directly
from gwproxy.app import admin_plane
from gwproxy.cli.offline import opened
from gwproxy.config import Config, ConfigError, Listen, find_config, load
from gwproxy.core.errors import GatewayError
from gwproxy.core.identity import is_id, parse
from gwproxy.core.routing import CATALOGUE
from gwproxy.log import Log
from gwproxy.state.directory import Author
from gwproxy.storage.database import DatabaseInUse, DatabaseRefused
from gwproxy.storage.segments import JournalInUse, JournalRefused

FINE: Final = 0
REFUSED: Final = 1
WRONG_USAGE: Final = 2
UNREACHABLE: Final = 3

_TIMEOUT_S: Final = 30.0
_LONGEST_ANSWER_BYTES: Final = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Ask:
    """One call of the admin plane. `path` is what follows `/admin/`."""

    method: str
    path: tuple[str, ...]
    body: bytes = b""
    page: Page | None = None


Call = Callable[[Ask], Awaitable[dict[str, Any]]]
Command = Callable[[argparse.Namespace, Call], Awaitable[int]]


class _Stop(Exception):
    """The command ends here, with this exit code and these words."""

    def __init__(self, code: int, words: str) -> None:
        super().__init__(words)
        self.code = code


# -- the words of the command line ---------------------------------------------------------------


def add_commands(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `users`, `orgs` and `keys`; each of their commands sets `func(args) -> exit code`."""
    common = common_arguments()
    limits = argparse.ArgumentParser(add_help=False)
    limits.add_argument("--monthly-limit-usd", metavar="USD", help='such as "12.50"')
    limits.add_argument("--rpm", type=int, help="requests a minute")
    limits.add_argument("--tpm", type=int, help="tokens a minute")
    limits.add_argument("--max-parallel", type=int, help="requests at once")

    users = family(subparsers, "users", "who may call: create, list, show")
    create = users.add_parser("create", parents=[common, limits], help="create a user")
    create.add_argument("--id", metavar="ID", help="default: a generated one")
    create.add_argument("--email")
    create.add_argument("--org", metavar="ID", help="default: the organization `default`")
    create.set_defaults(func=runs(_create_user))
    add_list(users, common, _list_users)
    _add_show(users, common, _show_user)

    orgs = family(subparsers, "orgs", "organizations: create, list, show")
    create = orgs.add_parser("create", parents=[common], help="create an organization")
    create.add_argument("--id", metavar="ID", help="default: a generated one")
    create.add_argument("--name")
    create.add_argument("--monthly-budget-usd", metavar="USD", help='such as "1000"')
    create.add_argument("--failure-mode", choices=["open", "closed"])
    create.add_argument("--fallback-daily-limit-usd", metavar="USD")
    create.set_defaults(func=runs(_create_org))
    add_list(orgs, common, _list_orgs)
    _add_show(orgs, common, _show_org)

    keys = family(subparsers, "keys", "users' API keys: create, list, check")
    create = keys.add_parser(
        "create",
        parents=[common, limits],
        help="create a key and print it, this once",
        description="Prints the key alone on stdout. It cannot be shown again.",
    )
    create.add_argument("--user", metavar="ID", required=True)
    create.add_argument("--name", help="to tell a user's keys apart")
    create.add_argument("--expires-at", metavar="TIME", help='such as "2027-12-31T23:59:59Z"')
    create.add_argument(
        "--allow-model", metavar="MODEL", action="append", help="may be repeated; default: all"
    )
    create.set_defaults(func=runs(_create_key))
    listing = add_list(keys, common, _list_keys)
    listing.add_argument("--user", metavar="ID", required=True)
    check = keys.add_parser(
        "check",
        help="check a key's form and checksum, without a server",
        description="Says whether a key was copied whole. Reads it from stdin if none is given, "
        "which keeps it out of the shell's history.",
    )
    check.add_argument("key", nargs="?", metavar="KEY")
    check.add_argument("--json", action="store_true", help="print JSON")
    check.set_defaults(func=_check_key)


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


def _add_show(
    family: "argparse._SubParsersAction[argparse.ArgumentParser]",
    common: argparse.ArgumentParser,
    command: Command,
) -> None:
    parser = family.add_parser("show", parents=[common], help="show one of them")
    parser.add_argument("id", metavar="ID")
    parser.set_defaults(func=runs(command))


# -- the commands --------------------------------------------------------------------------------


async def _create_user(args: argparse.Namespace, call: Call) -> int:
    body = _body(user_id=args.id, email=args.email, org_id=args.org, **_limits(args))
    print_one(args, await call(Ask("POST", ("users",), body)))
    return FINE


async def _list_users(args: argparse.Namespace, call: Call) -> int:
    columns = ("user_id", "org_id", "email", "status", "monthly_limit_usd", "created_at")
    await print_list(args, call, ("users",), columns)
    return FINE


async def _show_user(args: argparse.Namespace, call: Call) -> int:
    print_one(args, await call(Ask("GET", ("users", args.id))))
    return FINE


async def _create_org(args: argparse.Namespace, call: Call) -> int:
    body = _body(
        org_id=args.id,
        name=args.name,
        monthly_budget_usd=args.monthly_budget_usd,
        failure_mode=args.failure_mode,
        fallback_daily_limit_usd=args.fallback_daily_limit_usd,
    )
    print_one(args, await call(Ask("POST", ("organizations",), body)))
    return FINE


async def _list_orgs(args: argparse.Namespace, call: Call) -> int:
    columns = ("org_id", "name", "status", "monthly_budget_usd", "failure_mode", "created_at")
    await print_list(args, call, ("organizations",), columns)
    return FINE


async def _show_org(args: argparse.Namespace, call: Call) -> int:
    print_one(args, await call(Ask("GET", ("organizations", args.id))))
    return FINE


async def _create_key(args: argparse.Namespace, call: Call) -> int:
    body = _body(
        name=args.name,
        expires_at=args.expires_at,
        allowed_models=args.allow_model,
        **_limits(args),
    )
    key = await call(Ask("POST", ("users", args.user, "api-keys"), body))
    if args.json:
        _print_json(key)
    else:
        # Alone on stdout, so that KEY=$(gwproxy keys create --user ann) is all it takes.
        print(key["api_key"])
        say(f"This is {key['key_id']} of user {args.user}. Keep it now: it is not shown again.")
    return FINE


async def _list_keys(args: argparse.Namespace, call: Call) -> int:
    columns = ["key_id", "prefix", "name", "monthly_limit_usd", "expires_at", "last_used_at"]
    if args.deleted:
        columns.append("revoked_at")
    await print_list(args, call, ("users", args.user, "api-keys"), columns)
    return FINE


def _check_key(args: argparse.Namespace) -> int:
    text = args.key
    if text is None:
        text = getpass.getpass("API key: ") if sys.stdin.isatty() else sys.stdin.readline(4096)
    try:
        key = parse(text.strip())
    except ValueError as error:
        if args.json:
            _print_json({"ok": False, "problem": str(error)})
        else:
            print(f"not a key: {error}")
        return REFUSED
    if args.json:
        _print_json({"ok": True, "kind": key.kind, "prefix": key.prefix, "key_id": key.key_id})
    else:
        print(f"complete: a {key.kind} key, {key.prefix}..., {key.key_id}")
        say("Whether it is known and not revoked, only the gateway can say.")
    return FINE


def _limits(args: argparse.Namespace) -> dict[str, Any]:
    return {
        name: getattr(args, name) for name in ("monthly_limit_usd", "rpm", "tpm", "max_parallel")
    }


def _body(**fields: Any) -> bytes:
    return orjson.dumps({name: value for name, value in fields.items() if value is not None})


# -- how a command runs --------------------------------------------------------------------------


def runs(command: Command, *, of_server: bool = False) -> Callable[[argparse.Namespace], int]:
    """`of_server`: it means nothing without a running one."""

    def run(args: argparse.Namespace) -> int:
        try:
            config = load(find_config(args.config, os.environ), os.environ, catalogue=CATALOGUE)
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
        except _Stop as stop:
            say(str(stop))
            return stop.code

    return run


async def _run(args: argparse.Namespace, config: Config, command: Command, of_server: bool) -> int:
    if of_server or args.url is not None:
        return await command(args, _over_http(config, args.url))
    try:
        async with opened(config) as store:
            return await command(args, _offline(admin_plane(config, store, Log(sys.stderr))))
    except (DatabaseInUse, JournalInUse) as in_use:
        # Its owner is the server, as a rule: whoever holds the lock is the one to be asked.
        try:
            return await command(args, _over_http(config, None))
        except _Stop as stop:
            if stop.code == UNREACHABLE:
                raise _Stop(UNREACHABLE, f"{stop} The database is busy: {in_use}") from in_use
            raise


def _exit_code(status: int) -> int:
    # 401 and 403: the configured admin key is wrong. 400: so is an argument.
    return WRONG_USAGE if status in (400, 401, 403) else REFUSED


# -- without a server ----------------------------------------------------------------------------


def _offline(table: Sequence[Route]) -> Call:
    async def call(ask: Ask) -> dict[str, Any]:
        answer = await ask_directly(
            table,
            ask.method,
            "/admin/" + "/".join(ask.path),
            query=_parameters(ask),
            body=ask.body,
            ask=asked.Ask(Author(f"cli:{getpass.getuser()}")),
        )
        found: dict[str, Any] = msgspec.to_builtins(answer.value or {})
        return found

    return call


def _parameters(ask: Ask) -> list[tuple[str, str]]:
    page = ask.page
    if page is None:
        return []
    return [
        ("limit", str(page.limit)),
        ("cursor", page.cursor),
        ("deleted", str(int(page.deleted))),
    ]


# -- of a running server -------------------------------------------------------------------------


def _over_http(config: Config, url: str | None) -> Call:
    if config.admin.key is None:
        raise _Stop(
            WRONG_USAGE,
            "The running server has to be asked, and there is no admin key to ask it with: "
            "set GWPROXY_ADMIN_KEY as the server has it.",
        )
    authorization = f"Bearer {config.admin.key.reveal()}"

    async def call(ask: Ask) -> dict[str, Any]:
        if not all(is_id(part) for part in ask.path):
            raise _Stop(WRONG_USAGE, "An id has 1 to 64 characters out of A-Z, a-z, 0-9, _ and -.")
        target = "/admin/" + "/".join(ask.path)
        if parameters := _parameters(ask):
            target += "?" + urlencode(parameters)
        headers = {"Authorization": authorization}
        if ask.body:
            headers["Content-Type"] = "application/json"
        # A connection each, since a list of users is one or two calls; blocking, since nothing
        # else happens in this process.
        connection, place = _connection(config.admin.listen or config.server.listen, url)
        try:
            connection.request(ask.method, target, ask.body or None, headers)
            answer = connection.getresponse()
            status, raw = answer.status, answer.read(_LONGEST_ANSWER_BYTES)
        except (OSError, HTTPException) as error:
            raise _Stop(UNREACHABLE, f"No server answers at {place}: {error}.") from error
        finally:
            connection.close()
        return _understood(status, raw, place)

    return call


def _understood(status: int, raw: bytes, place: str) -> dict[str, Any]:
    if status == 204:
        return {}
    try:
        answer = orjson.loads(raw)
        if status in (200, 201) and isinstance(answer, dict):
            return answer
        words = str(answer["error"]["message"])
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise _Stop(
            UNREACHABLE, f"What answers at {place} is not gwproxy (status {status})."
        ) from error
    raise _Stop(_exit_code(status), words)


def _connection(listen: Listen, url: str | None) -> tuple[HTTPConnection, str]:
    """A connection that is not open yet, and the words for where it goes."""
    if url is not None:
        return _connection_to(url), url
    if listen.kind == "unix":
        return _UnixConnection(listen.path), f"unix:{listen.path}"
    if listen.kind == "fd" or listen.port == 0:
        raise _Stop(
            WRONG_USAGE, f'The configuration says "{listen}": name the server\'s address by --url.'
        )
    # What listens on every address is reached on this machine's own.
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(listen.host, listen.host)
    return HTTPConnection(host, listen.port, timeout=_TIMEOUT_S), str(listen)


def _connection_to(url: str) -> HTTPConnection:
    wrong = _Stop(WRONG_USAGE, '--url must be an address such as "http://127.0.0.1:8081".')
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


def say(words: str) -> None:
    print(words, file=sys.stderr)


def _print_json(value: object) -> None:
    print(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode())


def print_one(args: argparse.Namespace, row: dict[str, Any]) -> None:
    if args.json:
        _print_json(row)
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
        _print_json({"data": rows, "next_cursor": None})
        return
    cells = [[name.upper().replace("_", " ") for name in columns]]
    cells += [[_cell(name, row[name]) for name in columns] for row in rows]
    widths = [max(len(line[place]) for line in cells) for place in range(len(columns))]
    for line in cells:
        padded = (f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True))
        print("  ".join(padded).rstrip())


def _cell(name: str, value: object) -> str:
    if value is None or value == []:
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
