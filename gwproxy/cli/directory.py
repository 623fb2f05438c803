"""`gwproxy users`, `gwproxy orgs` and `gwproxy keys`: the directory from the command line.

What each noun has is a table; the commands are the same for all of them.
"""

import argparse
import getpass
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import orjson

from gwproxy.cli.plane import (
    FINE,
    REFUSED,
    WRONG_USAGE,
    Ask,
    Call,
    Stop,
    Unknown,
    add_list,
    common_arguments,
    family,
    print_list,
    print_one,
    runs,
)
from gwproxy.cli.printing import print_json, say
from gwproxy.core.errors import NotFound
from gwproxy.core.identity import KeyKind, KeyText, digest, is_id, parse


@dataclass(frozen=True, slots=True)
class Field:
    """A field of the API, and the option that is called after it."""

    name: str
    help: str = ""
    metavar: str | None = None
    choices: tuple[str, ...] | None = None
    number: bool = False
    json: bool = False
    option: str = ""
    fixed: bool = False
    """Given at the creation, and never changed."""

    @property
    def flag(self) -> str:
        return self.option or f"--{self.name.replace('_', '-')}"

    def value(self, text: str) -> Any:
        """As the API takes it; `none` is null: no limit."""
        if text == "none":
            return None
        if self.number and text.lstrip("-").isascii() and text.lstrip("-").isdigit():
            return int(text)
        if self.json:
            try:
                return orjson.loads(text)
            except ValueError as error:
                raise Stop(WRONG_USAGE, f"{self.flag} must be JSON.") from error
        return text


_STATUS: Final = Field("status", "default: active", choices=("active", "suspended"))
_LIMITS: Final = (
    Field("monthly_limit_usd", 'such as "12.50"', "USD"),
    Field("rpm", "requests a minute", "N", number=True),
    Field("tpm", "tokens a minute", "N", number=True),
    Field("max_parallel", "requests at once", "N", number=True),
)


@dataclass(frozen=True, slots=True)
class Noun:
    words: str
    path: str
    columns: tuple[str, ...]
    fields: tuple[Field, ...]


NOUNS: Final = {
    "users": Noun(
        "who may call",
        "users",
        ("user_id", "org_id", "email", "status", "monthly_limit_usd", "created_at"),
        (
            Field("user_id", "default: a generated one", "ID", option="--id", fixed=True),
            Field("org_id", "default: the organization `default`", "ID", option="--org"),
            Field("email"),
            _STATUS,
            *_LIMITS,
        ),
    ),
    "orgs": Noun(
        "organizations",
        "organizations",
        ("org_id", "name", "status", "monthly_budget_usd", "failure_mode", "created_at"),
        (
            Field("org_id", "default: a generated one", "ID", option="--id", fixed=True),
            Field("name"),
            _STATUS,
            Field("monthly_budget_usd", 'such as "1000"', "USD"),
            Field("failure_mode", "without the database", choices=("open", "closed", "none")),
            Field("fallback_daily_limit_usd", "a day without the database", "USD"),
            Field("unbounded_policy", choices=("clamp", "strict", "bounded")),
            Field("on_exhausted", choices=("cut", "finish")),
            Field("on_client_gone", choices=("close", "drain")),
            Field("cache", choices=("true", "false"), json=True),
            Field("allowed_features", "such as '[\"audio\"]'", "JSON", json=True),
            Field("prices", "USD per million tokens, by model", "JSON", json=True),
        ),
    ),
}

KEY_FIELDS: Final = (
    Field("name", "to tell a user's keys apart"),
    Field("expires_at", 'such as "2027-12-31T23:59:59Z"', "TIME"),
    *_LIMITS,
)


# -- the words of the command line ---------------------------------------------------------------


def add_commands(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `users`, `orgs` and `keys`; each of their commands sets `func(args) -> exit code`."""
    common = common_arguments()
    for name, noun in NOUNS.items():
        _add_noun(subparsers, name, noun, common)
    words = "users' API keys: create, list, show, set, rotate, revoke, check"
    keys = family(subparsers, "keys", words)
    create = keys.add_parser(
        "create",
        parents=[common],
        help="create a key and print it, this once",
        description="Prints the key alone on stdout. It cannot be shown again.",
    )
    create.add_argument("--user", metavar="ID", required=True)
    _add_options(create, KEY_FIELDS)
    _add_models(create)
    create.set_defaults(func=runs(_create_key))
    listing = add_list(keys, common, _list_keys)
    listing.add_argument("--user", metavar="ID", required=True)
    show = _add_one(keys, common, "show", "show a key, without its secret", _show_key)
    show.add_argument("--deleted", action="store_true", help="also if it is revoked")
    change = _add_one(keys, common, "set", "change a key: what is given, `none` for no limit", _set)
    _add_options(change, KEY_FIELDS)
    _add_models(change)
    rotate = _add_one(
        keys, common, "rotate", "give a key a new secret and print it, this once", _rotate_key
    )
    rotate.add_argument(
        "--grace-s",
        type=int,
        metavar="S",
        default=86_400,
        help="the secret before stays good so long; default: a day",
    )
    for word in ("revoke", "delete"):
        revoke = keys.add_parser(
            word,
            parents=[common],
            help="refuse keys from the next request on" if word == "revoke" else "the same",
            description="With --from-stdin: reads any text, such as a log or a commit that leaked, "
            "and revokes each key in it that is one of this gateway's. Only hashes are sent.",
        )
        revoke.add_argument("ids", nargs="*", metavar="KEY_ID")
        revoke.add_argument("--from-stdin", action="store_true", help="look for keys in a text")
        revoke.set_defaults(func=runs(_revoke_keys))
    check = keys.add_parser(
        "check",
        help="check a key's form and checksum, without a server",
        description="Says whether a key was copied whole. Without KEY it asks for one, or reads "
        "the first line of stdin, which keeps it out of the shell's history: "
        "`gwproxy keys check < key.txt`.",
    )
    check.add_argument("key", nargs="?", metavar="KEY")
    check.add_argument("--json", action="store_true", help="print JSON")
    check.set_defaults(func=_check_key)


def _add_noun(
    subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    noun: Noun,
    common: argparse.ArgumentParser,
) -> None:
    own = family(subparsers, name, f"{noun.words}: create, list, show, set, delete")

    async def create(args: argparse.Namespace, call: Call) -> int:
        body = orjson.dumps(_given(args, noun.fields))
        print_one(args, await call(Ask("POST", (noun.path,), body)))
        return FINE

    async def listed(args: argparse.Namespace, call: Call) -> int:
        await print_list(args, call, (noun.path,), noun.columns)
        return FINE

    async def show(args: argparse.Namespace, call: Call) -> int:
        query = (("deleted", "1"),) if args.deleted else ()
        print_one(args, await call(Ask("GET", (noun.path, args.id), query=query)))
        return FINE

    async def change(args: argparse.Namespace, call: Call) -> int:
        body = _changes(args, noun.fields)
        print_one(args, await call(Ask("PATCH", (noun.path, args.id), orjson.dumps(body))))
        return FINE

    async def delete(args: argparse.Namespace, call: Call) -> int:
        await call(Ask("DELETE", (noun.path, args.id)))
        if args.json:
            print_json({"id": args.id, "deleted": True})
        else:
            say(f"{args.id} is deleted. What was spent stays in the ledger.")
        return FINE

    creating = own.add_parser("create", parents=[common], help="create one")
    _add_options(creating, noun.fields)
    creating.set_defaults(func=runs(create))
    add_list(own, common, listed)
    showing = _add_one(own, common, "show", "show one of them", show)
    showing.add_argument("--deleted", action="store_true", help="also if it is deleted")
    words = "change one: what is given, `none` for no limit"
    _add_options(
        _add_one(own, common, "set", words, change),
        [field for field in noun.fields if not field.fixed],
    )
    _add_one(own, common, "delete", "delete one: its keys open nothing any longer", delete)


def _add_one(
    own: "argparse._SubParsersAction[argparse.ArgumentParser]",
    common: argparse.ArgumentParser,
    verb: str,
    words: str,
    command: Any,
) -> argparse.ArgumentParser:
    parser = own.add_parser(verb, parents=[common], help=words)
    parser.add_argument("id", metavar="ID")
    parser.set_defaults(func=runs(command))
    return parser


def _add_options(parser: argparse.ArgumentParser, fields: Iterable[Field]) -> None:
    for field in fields:
        parser.add_argument(
            field.flag,
            dest=f"field_{field.name}",
            metavar=field.metavar,
            choices=field.choices,
            help=field.help or None,
        )


def _add_models(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-model",
        metavar="MODEL",
        action="append",
        help="may be repeated; `none`: all of them",
    )


def _given(args: argparse.Namespace, fields: tuple[Field, ...]) -> dict[str, Any]:
    given = {field: getattr(args, f"field_{field.name}", None) for field in fields}
    return {field.name: field.value(text) for field, text in given.items() if text is not None}


def _changes(args: argparse.Namespace, fields: tuple[Field, ...]) -> dict[str, Any]:
    body = _given(args, fields)
    models = getattr(args, "allow_model", None)
    if models is not None:
        body["allowed_models"] = None if models == ["none"] else models
    if not body:
        flags = " ".join(field.flag for field in fields if not field.fixed)
        raise Stop(WRONG_USAGE, f"Nothing to change was given: {flags}")
    return body


# -- keys ----------------------------------------------------------------------------------------


async def _create_key(args: argparse.Namespace, call: Call) -> int:
    body = _given(args, KEY_FIELDS)
    if args.allow_model is not None and args.allow_model != ["none"]:
        body["allowed_models"] = args.allow_model
    key = await call(Ask("POST", ("users", args.user, "api-keys"), orjson.dumps(body)))
    _print_key(args, key, f"This is {key['key_id']} of user {args.user}.")
    return FINE


def _print_key(args: argparse.Namespace, key: dict[str, Any], words: str) -> None:
    if args.json:
        print_json(key)
        return
    # Alone on stdout, so that KEY=$(gwproxy keys create --user ann) is all it takes.
    print(key["api_key"])
    say(f"{words} Keep it now: it is not shown again.")


async def _list_keys(args: argparse.Namespace, call: Call) -> int:
    columns = ["key_id", "prefix", "name", "monthly_limit_usd", "expires_at", "last_used_at"]
    if args.deleted:
        columns.append("revoked_at")
    await print_list(args, call, ("users", args.user, "api-keys"), columns)
    return FINE


async def _found(call: Call, key_id: str, *query: tuple[str, str]) -> dict[str, Any]:
    return await call(Ask("GET", ("api-keys", key_id), query=query))


async def _path(call: Call, key_id: str) -> tuple[str, ...]:
    # Also where the user's organization is deleted: with another one the key would open again.
    user_id = (await _found(call, key_id, _ENDED_TOO))["user_id"]
    return "users", user_id, "api-keys", key_id


_ENDED_TOO: Final = ("deleted", "1")


async def _show_key(args: argparse.Namespace, call: Call) -> int:
    query = (("deleted", "1"),) if args.deleted else ()
    print_one(args, await _found(call, args.id, *query))
    return FINE


async def _set(args: argparse.Namespace, call: Call) -> int:
    body = orjson.dumps(_changes(args, KEY_FIELDS))
    print_one(args, await call(Ask("PATCH", await _path(call, args.id), body)))
    return FINE


async def _rotate_key(args: argparse.Namespace, call: Call) -> int:
    path = (*await _path(call, args.id), "rotate")
    key = await call(Ask("POST", path, orjson.dumps({"grace_s": args.grace_s})))
    _print_key(args, key, f"The secret of {args.id} before is good for {args.grace_s} s more.")
    return FINE


async def _revoke_keys(args: argparse.Namespace, call: Call) -> int:
    if args.from_stdin == bool(args.ids):
        raise Stop(WRONG_USAGE, "Name the keys by their ids, or give --from-stdin and a text.")
    done: list[dict[str, Any]] = []
    unknown: list[str] = []
    if args.from_stdin:
        for key, hashed in _keys_in(sys.stdin.buffer.read()):
            done.append(await _revoke_leaked(call, key, hashed))
    else:
        for key_id in args.ids:
            # The others may be the ones that leaked: an id that is mistyped does not keep them.
            if await _revoked(call, key_id):
                done.append({"key_id": key_id, "result": "revoked"})
            else:
                unknown.append(key_id)
                say(f"{key_id[:64]!r} is not known here, or revoked before.")
    if args.json:
        print_json({"data": done})
    elif args.from_stdin and not done:
        say("There is no key in that text.")
    else:
        for each in done:
            print(f"{each['key_id']}  {each['result']}")
    return REFUSED if unknown else FINE


async def _revoked(call: Call, key_id: str) -> bool:
    """Revoke this key; False where there is none, or none any more."""
    if not is_id(key_id):
        return False
    try:
        await call(Ask("DELETE", await _path(call, key_id)))
    except (Unknown, NotFound):
        return False
    return True


_KEY: Final = re.compile(rb"gw_(?:live|test|admin)_[0-9A-Za-z]{46}")
"""What follows may be anything, a letter too: the checksum tells a key from a longer word."""


def _keys_in(text: bytes) -> Iterator[tuple[KeyText, str]]:
    """Each whole key in it, once, with the hash by which the server knows it."""
    # A log is in any encoding, or broken: a key is ASCII, with zeros between in UTF-16 and UTF-32.
    leaked = [*_KEY.findall(text), *_KEY.findall(text.replace(b"\0", b""))]
    for found in (key.decode("ascii") for key in dict.fromkeys(leaked)):
        try:
            yield parse(found), digest(found).hex()
        except ValueError:
            continue  # the checksum says that nobody ever had it


async def _revoke_leaked(call: Call, key: KeyText, hashed: str) -> dict[str, Any]:
    done = {"key_id": key.key_id, "result": "revoked"}
    try:
        if key.kind is KeyKind.ADMIN:
            path = ("admin-keys", key.key_id)
            await call(Ask("GET", path, query=(("sha256", hashed),)))
            await call(Ask("DELETE", path))
        else:
            row = await _found(call, key.key_id, _ENDED_TOO, ("sha256", hashed))
            user_id = row["user_id"]
            await call(Ask("DELETE", ("users", user_id, "api-keys", key.key_id)))
            done["user_id"] = user_id
    except (Unknown, NotFound):
        done["result"] = "not known here, or revoked before"
    return done


def _check_key(args: argparse.Namespace) -> int:
    text = args.key
    if text is None:
        text = getpass.getpass("API key: ") if sys.stdin.isatty() else sys.stdin.readline(4096)
    if not text.strip():
        say("No key was given: as an argument, at the prompt, or by `gwproxy keys check < FILE`.")
        return WRONG_USAGE
    try:
        key = parse(text.strip())
    except ValueError as error:
        if args.json:
            print_json({"ok": False, "problem": str(error)})
        else:
            print(f"not a key: {error}")
        return REFUSED
    if args.json:
        print_json({"ok": True, "kind": key.kind, "prefix": key.prefix, "key_id": key.key_id})
    else:
        print(f"complete: a {key.kind} key, {key.prefix}..., {key.key_id}")
        say("Whether it is known and not revoked, only the gateway can say.")
    return FINE
