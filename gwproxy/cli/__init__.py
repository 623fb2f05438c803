"""The command line: one file a family of commands, found here."""

import argparse
import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import Final, NoReturn

from gwproxy import __version__

FAMILIES: Final[Mapping[str, str]] = {
    "serve": "serve",
    "reload": "serve",
    "check-config": "check",
    "demo": "demo",
    "demo-upstream": "demo",
    "users": "directory",
    "orgs": "directory",
    "keys": "directory",
    "admin-keys": "admin_keys",
    "usage": "reports",
    "requests": "reports",
    "audit": "reports",
    "export": "bulk",
    "import": "bulk",
    "providers": "providers",
    "prices": "prices",
    "ledger": "ledger",
    "backup": "backup",
    "drill": "drill",
    "restore": "backup",
    "doctor": "doctor",
    "cloudflare": "cloudflare",
    "reconcile": "reconcile",
    "simulate": "simulate",
}
"""Each command and the module of this package that has it, in the order of the help text."""


class _Parser(argparse.ArgumentParser):
    """Also of the commands: argparse makes theirs of the class of the first."""

    def error(self, message: str) -> NoReturn:
        if message.endswith("required: ID"):
            message += f" (one that begins with a dash comes last: {self.prog} -- -ID)"
        super().error(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 fine, 1 a check failed or the request was
    refused, 2 usage or configuration, 3 server unreachable."""
    words = sys.argv[1:] if argv is None else list(argv)
    parser = _Parser(
        prog="gwproxy",
        description="An edge proxy in front of an AI gateway.",
        epilog="Exit codes: 0 fine; 1 a check failed, or it was refused; 2 usage or configuration; "
        "3 the server cannot be reached.",
    )
    parser.add_argument("--version", action="version", version=f"gwproxy {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    # Importing them all takes half a second, which only the help text is worth.
    named = FAMILIES.get(words[0]) if words else None
    families = [named] if named else dict.fromkeys(FAMILIES.values())
    if words != ["--version"]:
        for family in families:
            importlib.import_module(f"gwproxy.cli.{family}").add_commands(commands)
    args, rest = parser.parse_known_args(words)
    if hasattr(args, "rest"):
        args.rest = rest  # a command that reads the rest of its line itself
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        code = args.func(args)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # `gwproxy users list | head`: whoever read has read enough.
        return 0
    assert isinstance(code, int)
    return code
