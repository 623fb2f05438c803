"""`gwproxy admin-keys`: keys that open the admin plane, made on the machine itself.

Without a configured key this is how the first administrator gets in: with the server stopped the
command writes where the server will read, under the same locks.
"""

import argparse

import orjson

from gwproxy.cli.plane import (
    FINE,
    Ask,
    Call,
    add_list,
    common_arguments,
    family,
    print_list,
    runs,
)
from gwproxy.cli.printing import print_json, say


def add_commands(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    common = common_arguments()
    keys = family(subparsers, "admin-keys", "administrators' own keys: create, list, revoke")
    create = keys.add_parser(
        "create",
        parents=[common],
        help="create an admin key and print it, this once",
        description="Prints the key alone on stdout. It cannot be shown again.",
    )
    create.add_argument("--name", help="to tell them apart")
    create.add_argument("--scope", choices=["read", "write"], default="read")
    create.add_argument("--expires-at", metavar="TIME", help='such as "2027-12-31T23:59:59Z"')
    create.set_defaults(func=runs(_create))
    add_list(keys, common, _list)
    revoke = keys.add_parser("revoke", parents=[common], help="revoke one of them, at once")
    revoke.add_argument("id", metavar="ID")
    revoke.set_defaults(func=runs(_revoke))


async def _create(args: argparse.Namespace, call: Call) -> int:
    fields = {"name": args.name, "scope": args.scope, "expires_at": args.expires_at}
    key = await call(Ask("POST", ("admin-keys",), orjson.dumps(fields)))
    if args.json:
        print_json(key)
    else:
        print(key["admin_key"])
        say(f"This is {key['key_id']}, to {key['scope']}. Keep it now: it is not shown again.")
    return FINE


async def _list(args: argparse.Namespace, call: Call) -> int:
    columns = ["key_id", "prefix", "name", "scope", "created_at", "expires_at", "last_used_at"]
    if args.deleted:
        columns.append("revoked_at")
    await print_list(args, call, ("admin-keys",), columns)
    return FINE


async def _revoke(args: argparse.Namespace, call: Call) -> int:
    await call(Ask("DELETE", ("admin-keys", args.id)))
    if args.json:
        print_json({"key_id": args.id, "revoked": True})
    else:
        say(f"{args.id} is refused from now on.")
    return FINE
