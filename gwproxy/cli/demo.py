"""`gwproxy demo`: the gateway in front of its built-in upstream, on this machine alone, in a
minute; and `gwproxy demo-upstream`, that upstream by itself.

Server and upstream are the same two processes that anybody would start; only their configuration
and their state live in a folder that is thrown away.
"""

import argparse
import contextlib
import http.client
import json
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from gwproxy.cli.children import STOPS, Failed, address, child, clean_environ, last_words
from gwproxy.cli.proofs import PRICES, NotShown, Stage, show_budget, show_outage, show_recovery

FINE: Final = 0
FAILED: Final = 1

PORT: Final = 8080
MODEL: Final = "openai/gpt-4o-mini"
QUESTION: Final = "Why do people put a proxy in front of an AI gateway?"
SETTLED_WITHIN_S: Final = 2.0

_CONFIG: Final = """\
# Written by `gwproxy demo`; thrown away with its folder.
[server]
listen = "127.0.0.1:{port}"
drain_s = 2
[admin]
key = "env:GWPROXY_ADMIN_KEY"
[upstream]
flavour = "cloudflare-compat"
base_url = "{upstream}/v1/demo/demo"
token = "env:CLOUDFLARE_API_TOKEN"
[providers.openai]
[providers.anthropic]
[providers.gemini]
prefix = "google-ai-studio"
model = "gemini-2.5-flash"
[providers.mock]
prefix = "mock"
[models.auto]
chain = ["gemini", {{ provider = "openai", model = "gpt-4o-mini" }}]
[prices.models."mock/*"]
input = "1.00"
output = "2.00"
[metrics]
open = true
"""
_SHOWN: Final = (
    *("x-request-id", "x-gateway-provider", "x-gateway-mode", "x-gateway-scope"),
    *("x-gateway-usage-usd", "x-gateway-held-usd", "x-gateway-reset", "server-timing"),
)


def add_commands(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    demo = subparsers.add_parser(
        "demo",
        help="try it: the gateway with a built-in upstream, no account needed",
        description="Starts a gateway and an upstream on loopback with state in a scratch folder, "
        "sends one streamed chat, shows what the gateway promises, and stays up until Ctrl-C.",
    )
    demo.add_argument(
        "--port", type=int, default=PORT, help=f"default {PORT}, or a free one if that is taken"
    )
    demo.add_argument("--once", action="store_true", help="stop after what is to be seen")
    demo.add_argument("--quick", action="store_true", help="show the chat alone")
    demo.set_defaults(func=run)
    upstream = subparsers.add_parser(
        "demo-upstream",
        help="the built-in upstream alone",
        description="An upstream that speaks like an AI gateway, for trying things out.",
        add_help=False,
    )
    upstream.set_defaults(func=run_upstream, rest=())


def run_upstream(args: argparse.Namespace) -> int:
    from gwproxy.demo import main

    return main(args.rest)


def run(args: argparse.Namespace) -> int:
    for number in STOPS:
        # SIGINT as well: a shell's background jobs start with it ignored.
        signal.signal(number, _stop)
    with (
        tempfile.TemporaryDirectory(prefix="gwproxy-demo-") as folder,
        contextlib.ExitStack() as stack,
    ):
        try:
            return _run(args, Path(folder), stack)
        except (Failed, NotShown) as failed:
            print(f"gwproxy demo: {failed}", file=sys.stderr)
            return FAILED
        except KeyboardInterrupt:
            print("\nStopping.", flush=True)
            return FINE
        finally:
            _stop_asking()


def _stop(*_: object) -> None:
    """Each of the signals ends it as Ctrl-C does."""
    _stop_asking()
    raise KeyboardInterrupt


def _stop_asking() -> None:
    """From here on the children are stopped and the folder goes, however often it is asked."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


def _run(args: argparse.Namespace, folder: Path, stack: contextlib.ExitStack) -> int:
    if not 0 <= args.port < 1 << 16:
        raise Failed(f"there is no port {args.port}")
    token, admin_key = secrets.token_hex(16), secrets.token_hex(32)
    environ = {
        **clean_environ(),
        "GWPROXY_ADMIN_KEY": admin_key,
        "CLOUDFLARE_API_TOKEN": token,
        "PYTHONUNBUFFERED": "1",
    }
    # The same as `gwproxy demo-upstream`, without loading the gateway for it.
    demo = [sys.executable, "-m", "gwproxy.demo", "--listen", "127.0.0.1:0"]
    demo += ["--token", token, "--account", "demo", "--gateway", "demo"]
    upstream = stack.enter_context(child(demo, environ, folder / "upstream.log"))
    upstream_url = address(upstream, folder)
    port = args.port if _is_free(args.port) else 0
    config = folder / "config.toml"
    config.write_text(_CONFIG.format(port=port, upstream=upstream_url) + PRICES)
    serve = [sys.executable, "-m", "gwproxy", "serve", "--config", str(config)]
    gateways = stack.enter_context(contextlib.ExitStack())

    def start() -> "tuple[subprocess.Popen[str], str]":
        process = gateways.enter_context(child(serve, environ, folder / "serve.log"))
        return process, address(process, folder)

    server, url = start()
    config.write_text(config.read_text().replace("127.0.0.1:0", url.removeprefix("http://")))
    if args.port and not port:
        print(f"port {args.port} is taken, so it is another one:")
    print(f"gateway   {url}")
    print(f"upstream  {upstream_url}   (built in: no account, no network)")
    print(f"state     {folder}   (goes when this ends)")

    admin = {"Authorization": f"Bearer {admin_key}"}
    _ask(url, "POST", "/admin/organizations", admin, {"org_id": "acme", "name": "Acme"})
    user = {"user_id": "alice", "org_id": "acme", "email": "alice@example.com"}
    _ask(url, "POST", "/admin/users", admin, user)
    made = _ask(url, "POST", "/admin/users/alice/api-keys", admin, {"name": "demo"})
    key = made["api_key"]
    print(f"created   organization acme, user alice, key {made['key_id']}\n")

    print(f"> {QUESTION}")
    headers = _chat(url, key)
    for name in _SHOWN:
        print(f"  {name}: {headers.get(name)}")

    def restart() -> None:
        nonlocal server
        server.kill()
        server.wait()
        server, _ = start()

    stage = Stage(url.removeprefix("http://"), config, environ, admin, restart)
    print(f"  {_receipt(stage, key, str(headers.get('x-request-id')))}\n")
    if not args.quick:
        show_budget(stage)
        show_recovery(stage)
        show_outage(stage)
    print(
        f"""
Try it yourself:

  curl -N {url}/v1/chat/completions \\
    -H 'Authorization: Bearer {key}' -H 'Content-Type: application/json' \\
    -d '{{"model":"{MODEL}","stream":true,"messages":[{{"role":"user","content":"Hello"}}]}}'

Or with any OpenAI SDK:

  export OPENAI_BASE_URL={url}/v1
  export OPENAI_API_KEY={key}

Metrics: {url}/metrics   Log: {folder / "serve.log"}""",
    )
    if args.once:
        print("Stopping: it was asked to show this once.", flush=True)
        return FINE
    print("Stop: Ctrl-C", flush=True)
    while server.poll() is None and upstream.poll() is None:
        time.sleep(0.2)  # two children to watch, and nothing that waits for either
    raise Failed(f"a process ended by itself:\n{last_words(folder)}")


def _chat(url: str, key: str) -> http.client.HTTPMessage:
    """One streamed chat, its text printed as it comes."""
    body = {
        "model": MODEL,
        "stream": True,
        "messages": [{"role": "user", "content": QUESTION}],
    }
    connection = _connect(url)
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    response = connection.getresponse()
    if response.status != 200:
        raise Failed(f"the chat was answered {response.status}: {response.read().decode()}")
    for line in response:
        text = line.decode().strip()
        if text.startswith("data: {"):
            for choice in json.loads(text[6:]).get("choices", ()):
                print(choice["delta"].get("content") or "", end="", flush=True)
    print("\n")
    connection.close()
    return response.headers


def _receipt(stage: Stage, key: str, request_id: str) -> str:
    """What the ledger has of the request, once its stream is settled."""
    until = time.monotonic() + SETTLED_WITHIN_S
    headers = {"Authorization": f"Bearer {key}"}
    while time.monotonic() < until:
        found = stage.ask("GET", f"/v1/receipts/{request_id}", headers)
        if found["outcome"] is not None:
            return f"receipt: {found['outcome']}, {found['formula']}"
        time.sleep(0.02)  # it is settled when the upstream has ended, not when we have read all
    raise Failed(f"the request is not settled:\n{last_words(Path(stage.config).parent)}")


def _ask(url: str, method: str, path: str, headers: dict[str, str], body: Any) -> Any:
    connection = _connect(url)
    sent = {**headers, "Content-Type": "application/json"}
    connection.request(method, path, json.dumps(body), sent)
    response = connection.getresponse()
    answer = response.read()
    connection.close()
    if response.status >= 300:
        raise Failed(f"{method} {path} was answered {response.status}: {answer.decode()}")
    return json.loads(answer)


def _connect(url: str) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return True
    return False
