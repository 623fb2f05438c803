"""`gwproxy demo`: the gateway in front of its built-in upstream, on this machine alone, in a
minute; and `gwproxy demo-upstream`, that upstream by itself.

Server and upstream are the same two processes that anybody would start; only their configuration
and their state live in a folder that is thrown away.
"""

import argparse
import contextlib
import http.client
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

FINE: Final = 0
FAILED: Final = 1

PORT: Final = 8080
MODEL: Final = "openai/gpt-4o-mini"
QUESTION: Final = "Why do people put a proxy in front of an AI gateway?"
START_WITHIN_S: Final = 20.0

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


def add_commands(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    demo = subparsers.add_parser(
        "demo",
        help="try it: the gateway with a built-in upstream, no account needed",
        description="Starts a gateway and an upstream on loopback with state in a scratch folder, "
        "sends one streamed chat, and stays up until Ctrl-C.",
    )
    demo.add_argument(
        "--port", type=int, default=PORT, help=f"default {PORT}, or a free one if that is taken"
    )
    demo.add_argument("--once", action="store_true", help="stop after the chat")
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
    # SIGTERM ends the demo as Ctrl-C does: both children are stopped, the folder goes.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with (
        tempfile.TemporaryDirectory(prefix="gwproxy-demo-") as folder,
        contextlib.ExitStack() as stack,
    ):
        try:
            return _run(args, Path(folder), stack)
        except _Failed as failed:
            print(f"gwproxy demo: {failed}", file=sys.stderr)
            return FAILED
        except KeyboardInterrupt:
            print("\nStopping.")
            return FINE


class _Failed(Exception):
    """The demo cannot go on; the words say why."""


def _run(args: argparse.Namespace, folder: Path, stack: contextlib.ExitStack) -> int:
    token, admin_key = secrets.token_hex(16), secrets.token_hex(32)
    environ = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("GWPROXY_", "AI_", "CLOUD"))},
        "GWPROXY_ADMIN_KEY": admin_key,
        "CLOUDFLARE_API_TOKEN": token,
        "PYTHONUNBUFFERED": "1",
    }
    demo = [sys.executable, "-m", "gwproxy", "demo-upstream", "--listen", "127.0.0.1:0"]
    upstream = stack.enter_context(
        _child([*demo, "--token", token, "--account", "demo", "--gateway", "demo"], environ, folder)
    )
    upstream_url = _address(upstream, folder)
    port = _free_port(args.port)
    config = folder / "config.toml"
    config.write_text(_CONFIG.format(port=port, upstream=upstream_url))
    serve = [sys.executable, "-m", "gwproxy", "serve", "--config", str(config)]
    server = stack.enter_context(_child(serve, environ, folder))
    url = _address(server, folder)
    print(f"gateway   {url}   (upstream {upstream_url}, state in {folder})")

    admin = {"Authorization": f"Bearer {admin_key}"}
    _ask(url, "POST", "/admin/organizations", admin, {"org_id": "acme", "name": "Acme"})
    user = {"user_id": "alice", "org_id": "acme", "email": "alice@example.com"}
    _ask(url, "POST", "/admin/users", admin, user)
    made = _ask(url, "POST", "/admin/users/alice/api-keys", admin, {"name": "demo"})
    key = made["api_key"]
    print(f"created   organization acme, user alice, key {made['key_id']}\n")

    print(f"> {QUESTION}")
    headers = _chat(url, key)
    for name in ("x-request-id", "x-gateway-provider", "x-gateway-mode", "server-timing"):
        print(f"  {name}: {headers.get(name)}")
    print(
        f"""
Try it yourself:

  curl -N {url}/v1/chat/completions \\
    -H 'Authorization: Bearer {key}' -H 'Content-Type: application/json' \\
    -d '{{"model":"{MODEL}","stream":true,"messages":[{{"role":"user","content":"Hello"}}]}}'

Or with any OpenAI SDK:

  export OPENAI_BASE_URL={url}/v1
  export OPENAI_API_KEY={key}

Metrics: {url}/metrics   Log: {folder / "serve.log"}   Stop: Ctrl-C""",
        flush=True,
    )
    if args.once:
        return FINE
    while server.poll() is None and upstream.poll() is None:
        time.sleep(0.2)
    raise _Failed(f"a process ended by itself:\n{_last_words(folder)}")


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
        raise _Failed(f"the chat was answered {response.status}: {response.read().decode()}")
    for line in response:
        text = line.decode().strip()
        if text.startswith("data: {"):
            for choice in json.loads(text[6:]).get("choices", ()):
                print(choice["delta"].get("content") or "", end="", flush=True)
    print("\n")
    connection.close()
    return response.headers


def _ask(url: str, method: str, path: str, headers: dict[str, str], body: Any) -> Any:
    connection = _connect(url)
    sent = {**headers, "Content-Type": "application/json"}
    connection.request(method, path, json.dumps(body), sent)
    response = connection.getresponse()
    answer = response.read()
    connection.close()
    if response.status >= 300:
        raise _Failed(f"{method} {path} was answered {response.status}: {answer.decode()}")
    return json.loads(answer)


def _connect(url: str) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)


@contextlib.contextmanager
def _child(
    command: list[str], environ: dict[str, str], folder: Path
) -> Iterator["subprocess.Popen[str]"]:
    """A process that ends with the demo; what it says on stderr goes to a file of its name."""
    log = (folder / f"{command[3]}.log").open("w")
    with log:
        process = subprocess.Popen(
            command,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            # Ctrl-C is the demo's to handle: the children are stopped in order.
            start_new_session=True,
        )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()


def _address(process: "subprocess.Popen[str]", folder: Path) -> str:
    """The address that a child prints when it is ready."""
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"https?://[^\s/]+", line)
    if found is None:
        process.wait(timeout=START_WITHIN_S)
        raise _Failed(f"a process did not start:\n{_last_words(folder)}")
    return found[0]


def _last_words(folder: Path) -> str:
    lines: list[str] = []
    for log in sorted(folder.glob("*.log")):
        lines += log.read_text().splitlines()[-5:]
    return "\n".join(lines)


def _free_port(wanted: int) -> int:
    """`wanted` if nobody has it, else one that the system chooses."""
    for port in (wanted, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                free: int = probe.getsockname()[1]
                return free
    raise _Failed("there is no free port on 127.0.0.1")
