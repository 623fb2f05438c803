"""`gwproxy serve`: run the gateway in the foreground."""

import argparse
import os
import signal
import sys
import time
from typing import Final

import uvloop

from gwproxy.app import serve
from gwproxy.assets import AssetError
from gwproxy.cli.plane import UNREACHABLE, Ask, Call, Stop, Unauthorized, common_arguments, runs
from gwproxy.cli.printing import print_json
from gwproxy.config import Config, ConfigError, find_config, load
from gwproxy.core.routing import CATALOGUE
from gwproxy.listener import ParserRefused
from gwproxy.log import Log
from gwproxy.notify import Notify
from gwproxy.storage.database import DatabaseInUse, DatabaseRefused, lock
from gwproxy.storage.segments import JournalRefused

FINE = 0
FAILED = 1
WRONG_CONFIGURATION = 2

REFUSED_START_S: Final = 3.0
"""What a start under a service manager takes at least where the configuration is wrong: a socket
unit starts its service anew while a client waits, and gives up after twenty in two seconds."""


def add_commands(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "serve",
        help="run the gateway",
        description="Runs in the foreground, logs JSON lines to stderr, prints its addresses "
        "on one line of stdout when it is ready. SIGTERM drains and stops it, SIGHUP reads the "
        "configuration anew.",
    )
    parser.add_argument("--config", metavar="FILE", help="default: $GWPROXY_CONFIG, ./config.toml")
    parser.set_defaults(func=run)
    reload = subparsers.add_parser(
        "reload",
        parents=[common_arguments()],
        help="have the running server take its configuration anew, without dropping a stream",
        description="As SIGHUP, which the log answers; here the answer is printed.",
    )
    reload.set_defaults(func=runs(_reload, of_server=True))


async def _reload(args: argparse.Namespace, call: Call) -> int:
    try:
        answer = await call(Ask("POST", ("reload",)))
    except Unauthorized as stop:
        raise Stop(
            stop.code,
            f"{stop} The running server has another admin key than the configuration that is read "
            f"here. To have it read that: {_hangup(args.config)}; its log has the answer. A key "
            "that the server has from its environment or as a service's credential is changed by a "
            "restart.",
        ) from stop
    except Stop as stop:
        if stop.code != UNREACHABLE or args.url is not None:
            raise
        raise Stop(
            UNREACHABLE,
            f"{stop} The running server listens where it did when it started: where the "
            "configuration has another address by now, name the old one by --url, or send the "
            "process SIGHUP.",
        ) from stop
    if args.json:
        print_json(answer)
        return FINE
    print("The configuration is in force.")
    for setting in answer["needs_restart"]:
        print(f"{setting}: stays as it was until a restart")
    return FINE


def _hangup(config: str | None) -> str:
    """The command that does without a key, for whoever may send the server a signal."""
    found = load(find_config(config, os.environ), os.environ, catalogue=CATALOGUE, local=True)
    try:
        os.close(lock(found.storage.path))
    except DatabaseInUse as in_use:
        return f"kill -HUP {in_use.pid or 'PID'}"
    except DatabaseRefused:
        pass  # another machine's server, or another user's
    return "send it SIGHUP"


def run(args: argparse.Namespace) -> int:
    # Database, sockets and whatever else is made: for this user alone.
    os.umask(0o077)
    # Until the configuration is read there is nothing to read anew, and nothing to die of.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def source() -> Config:
        return load(find_config(args.config, os.environ), os.environ, catalogue=CATALOGUE)

    try:
        config = source()
    except ConfigError as error:
        print(error, file=sys.stderr, flush=True)
        if "NOTIFY_SOCKET" in os.environ or "LISTEN_FDS" in os.environ:
            time.sleep(REFUSED_START_S)
        return WRONG_CONFIGURATION
    log = Log(level=config.log.level)
    log.start()
    notify = Notify(os.environ, os.getpid())
    try:
        unsettled = uvloop.run(serve(source, config, log, _announce, notify))
    except (DatabaseRefused, JournalRefused, AssetError, ParserRefused) as error:
        print(f"gwproxy: {error}", file=sys.stderr)
        return FAILED
    except OSError as error:
        print(f"gwproxy: cannot listen or read: {error}", file=sys.stderr)
        return FAILED
    finally:
        notify.close()
        log.stop()
    if unsettled:
        print(
            "gwproxy: the journal could not be written at the end. The next start settles: "
            f"{', '.join(unsettled)}",
            file=sys.stderr,
        )
        return FAILED
    return FINE


def _announce(addresses: list[str]) -> None:
    print(f"gwproxy ready on {' '.join(addresses)}", flush=True)
