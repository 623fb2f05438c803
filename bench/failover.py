"""What a failover adds to a request: `python -m bench.failover`, over loopback sockets.

The gateway, its upstreams and the client share one process and take turns, so the figures are
times of whole requests, compared within a round. The upstreams answer at once: what is left is
the gateway's own share, and one local round trip for each provider that is asked.
"""

import argparse
import asyncio
import gc
import io
import os
import platform
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import cast

import orjson
import uvloop

from gwproxy.app import GIL_SWITCH_S, App
from gwproxy.config import load
from gwproxy.core.routing import CATALOGUE
from gwproxy.log import Log

RESULTS = Path(__file__).resolve().parent / "FAILOVER.md"
ADMIN_KEY = "the-benchmarks-own-admin-key-of-no-value"

ANSWER = orjson.dumps(
    {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1767225600,
        "model": "good",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello there."},
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14},
    }
)
NO = b'{"error":{"message":"no"}}'

# 429 moves on and is not counted, so that this breaker stays closed for as long as one likes.
UPSTREAMS = {"good": ("200 OK", ANSWER), "busy": ("429 Too Many", NO), "down": ("503 No", NO)}

CHAINS = {
    # what is measured: the chain, and the status that says that it was
    "one provider, which answers": (["good"], 200),
    "the first fails, the second answers": (["busy", "good"], 200),
    "two fail, the third answers": (["busy", "busier", "good"], 200),
    "all three fail": (["busy", "busier", "busiest"], 429),
    "the first is OPEN and skipped, the second answers": (["down", "good"], 200),
    "all are OPEN": (["down"], 503),
}

CONFIG = """
[server]
listen = "127.0.0.1:0"
[admin]
key = "env:GWPROXY_ADMIN_KEY"
[upstream]
flavour = "openai"
base_url = "http://127.0.0.1:9/v1"
[breaker]
open_timeout_ms = 3600000
[storage]
journal_segment_bytes = 16777216
[log]
level = "error"
"""


class Fixed(asyncio.Protocol):
    """Answers each request with the same bytes as soon as all of it is there."""

    def __init__(self, status: str, body: bytes) -> None:
        head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\n"
        self._answer = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, end, body = self._buffer.partition(b"\r\n\r\n")
        if end and len(body) >= _length(head):
            self._buffer = b""
            self._transport.write(self._answer)


def _length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    return 0


class Client:
    """One keep-alive connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def post(self, path: str, key: str, value: object) -> tuple[int, bytes]:
        body = orjson.dumps(value)
        self._writer.write(
            f"POST {path} HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer {key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        head = await self._reader.readuntil(b"\r\n\r\n")
        return int(head[9:12]), await self._reader.readexactly(_length(head))


async def measure(number: int) -> Mapping[str, list[float]]:
    """Milliseconds of each request, by the name of its chain."""
    loop = asyncio.get_running_loop()
    servers = []
    tables = [CONFIG]
    for name, kind in (
        ("good", "good"),
        *((name, "busy") for name in ("busy", "busier", "busiest")),
        ("down", "down"),
    ):
        status, body = UPSTREAMS[kind]
        server = await loop.create_server(lambda s=status, b=body: Fixed(s, b), "127.0.0.1", 0)
        servers.append(server)
        port = server.sockets[0].getsockname()[1]
        tables.append(
            f'[providers.{name}]\nbase_url = "http://127.0.0.1:{port}/v1"\nprefix = ""\n'
            f'model = "{name}"\n[prices.models."{name}/{name}"]\ninput = "1"\noutput = "2"\n'
        )
    for place, (chain, _) in enumerate(CHAINS.values()):
        tables.append(f"[models.chain{place}]\nchain = {chain}\n")
    took: dict[str, list[float]] = {name: [] for name in CHAINS}
    with tempfile.TemporaryDirectory(prefix="gwproxy-bench-") as folder:
        path = Path(folder) / "config.toml"
        path.write_text("".join(tables))
        config = load(path, {"GWPROXY_ADMIN_KEY": ADMIN_KEY}, catalogue=CATALOGUE)
        app = await App.start(config, Log(io.StringIO(), "error"))
        try:
            host, _, port_text = app.addresses[0].removeprefix("http://").rpartition(":")
            client = Client(*await asyncio.open_connection(host, int(port_text)))
            await client.post("/admin/users", ADMIN_KEY, {"user_id": "bench"})
            _, made = await client.post("/admin/users/bench/api-keys", ADMIN_KEY, {})
            key = orjson.loads(made)["api_key"]

            async def ask(place: int) -> int:
                message = {"role": "user", "content": "Hello there. " * 100}
                body = {"model": f"chain{place}", "messages": [message], "max_tokens": 50}
                status, _ = await client.post("/v1/chat/completions", key, body)
                return status

            for _ in range(3):  # its breaker opens
                await ask(len(CHAINS) - 1)
            for _ in range(200):
                await ask(0)
            for _ in range(number):
                for place, (name, (_, wanted)) in enumerate(CHAINS.items()):
                    began = time.perf_counter()
                    status = await ask(place)
                    took[name].append((time.perf_counter() - began) * 1000)
                    assert status == wanted, f"{name}: status {status}"
        finally:
            await app.stop()
            for server in servers:
                server.close()
    return took


def report(took: Mapping[str, list[float]]) -> str:
    first, *_ = took.values()
    lines = [
        "# What a failover costs",
        "",
        "Milliseconds of whole requests over loopback, one after the other, with providers that",
        "answer or refuse at once; what a real failure takes to be noticed comes on top. Client,",
        "gateway and upstreams share one process. The kinds take turns, and what one adds is the",
        "median of its differences to the first one in the same turn. Written by",
        f"`python -m bench.failover`: {len(first)} requests of each kind, Python",
        f"{sys.version.split()[0]}, a load of {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores",
        f"of {platform.node()}.",
        "",
        "| what | median | added |",
        "|---|---|---|",
    ]
    for name, values in took.items():
        added = median([one - plain for one, plain in zip(values, first, strict=True)])
        lines.append(f"| {name} | {median(values):.2f} | {added:+.2f} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.failover")
    parser.add_argument("--number", type=int, default=1000, help="requests of each kind")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    args = parser.parse_args()
    gc.freeze()
    gc.set_threshold(10_000, 100, 20)
    sys.setswitchinterval(GIL_SWITCH_S)
    text = report(uvloop.run(measure(args.number)))
    print(text)
    if args.write:
        RESULTS.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
