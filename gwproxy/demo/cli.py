"""`gwproxy demo-upstream`: the demo upstream as a process, until it is told to stop."""

import argparse
import asyncio
import signal
import ssl
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .server import DemoUpstream


def main(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    host, _, port = str(args.listen).rpartition(":")
    if not host or not port.isdecimal():
        print("demo-upstream: --listen takes HOST:PORT", file=sys.stderr)
        return 2
    if (args.tls_cert is None) != (args.tls_key is None):
        print("demo-upstream: --tls-cert and --tls-key go together", file=sys.stderr)
        return 2
    context = None
    if args.tls_cert is not None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(args.tls_cert, args.tls_key)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        try:
            runner.run(_run(args, host.strip("[]"), int(port), context))
        except OSError as failed:
            print(f"demo-upstream: cannot listen on {args.listen}: {failed}", file=sys.stderr)
            return 1
    return 0


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """uvloop's where it is installed: a third faster; the demo does well without."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop


async def _run(
    args: argparse.Namespace, host: str, port: int, context: ssl.SSLContext | None
) -> None:
    demo = DemoUpstream(
        token=args.token,
        account=args.account,
        gateway=args.gateway,
        provider_keys=frozenset(args.provider_key),
        event_interval_ms=args.event_interval_ms,
        record_file=args.record,
        ssl_context=context,
    )
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, stop.set)
    await demo.start(host, port)
    try:
        # The line that a parent process waits for.
        print(f"demo upstream listening on {demo.url}", flush=True)
        await stop.wait()
    finally:
        await demo.stop()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gwproxy demo-upstream",
        description="An upstream that speaks like an AI gateway, with faults for the asking: "
        "GET /_demo lists them.",
    )
    parser.add_argument("--listen", default="127.0.0.1:0", metavar="HOST:PORT")
    parser.add_argument("--token", default="demo-token", help="what callers must present")
    parser.add_argument("--account", default="demo")
    parser.add_argument("--gateway", default="demo")
    parser.add_argument(
        "--provider-key",
        action="append",
        default=[],
        help="a key that the providers know; may be given more than once",
    )
    parser.add_argument("--record", type=Path, metavar="FILE", help="one JSON line a request")
    parser.add_argument("--event-interval-ms", type=float, default=20.0)
    parser.add_argument("--tls-cert", type=Path, metavar="FILE")
    parser.add_argument("--tls-key", type=Path, metavar="FILE")
    return parser
