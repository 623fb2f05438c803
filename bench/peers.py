"""The other AI gateways: how each is installed, in an environment of its own, and configured.

    python -m bench.peers install [NAME ...]    # into bench/.peers, which git ignores
    python -m bench.peers list

Never part of the tests: what is not installed is left out of the run, with the reason. Versions
are pinned in bench/pins, with all that they bring along. Each is set up as its own documentation
advises for production, with one worker, and told to leave the network alone.
"""

import argparse
import json
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.entrant import SOME_KEY, Contestant, Entrant, Site, Unavailable

HOME = Path(__file__).resolve().parent / ".peers"
PINS = Path(__file__).resolve().parent / "pins"

# Their start-up and their request cost leave no doubt either way, and a second upstream would
# double the longest part of the run.
PLAIN = ("plain",)

MASTER_KEY = "sk-benchmark-master-key-" + "0" * 24
UPSTREAM_KEY = "benchmark-upstream-token"


# -- installing ----------------------------------------------------------------------------------


def _python_packages(name: str) -> None:
    home = HOME / name
    subprocess.run([sys.executable, "-m", "venv", "--clear", home], check=True)
    pip = (home / "bin" / "python", "-m", "pip", "install", "--quiet")
    subprocess.run(
        [*pip, "--disable-pip-version-check", "--no-deps", "-r", PINS / f"{name}.txt"], check=True
    )


def _node_packages(name: str) -> None:
    if shutil.which("npm") is None:
        raise Unavailable("npm is not installed")
    home = HOME / name
    shutil.rmtree(home, ignore_errors=True)
    shutil.copytree(PINS / name, home)
    quiet = ("--ignore-scripts", "--no-audit", "--no-fund", "--silent")
    subprocess.run(["npm", "ci", *quiet], cwd=home, check=True)


def _installed(path: Path, name: str) -> Path:
    if not path.exists():
        raise Unavailable(f"it is not installed (`python -m bench.peers install {name}`)")
    return path


def _pinned(name: str, package: str) -> str:
    for line in (PINS / f"{name}.txt").read_text().splitlines():
        if line.startswith(f"{package}=="):
            return line.partition("==")[2].split()[0]
    raise AssertionError(f"{package} is pinned")


# -- LiteLLM -------------------------------------------------------------------------------------

_LITELLM = """
model_list:
  - model_name: {model}
    litellm_params:
      model: openai/gpt-4o-mini
      api_base: {upstream}/v1
      api_key: {key}
general_settings:
  master_key: {master}
litellm_settings:
  request_timeout: 600
  set_verbose: false
  json_logs: true
  telemetry: false
"""


def litellm(site: Site) -> Contestant:
    program = _installed(HOME / "litellm" / "bin" / "litellm", "litellm")
    config = site.folder / "config.yaml"
    config.write_text(
        _LITELLM.format(
            model="openai/gpt-4o-mini", upstream=site.upstream, key=UPSTREAM_KEY, master=MASTER_KEY
        )
    )
    return Contestant(
        command=(
            *(str(program), "--config", str(config), "--num_workers", "1"),
            *("--host", "127.0.0.1", "--port", str(site.port)),
        ),
        ready_path="/health/liveliness",
        headers={"Authorization": f"Bearer {MASTER_KEY}"},
        environ={
            "LITELLM_MODE": "PRODUCTION",
            "LITELLM_LOG": "ERROR",
            # Its price map comes with the package; by default it is fetched at each start.
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "LITELLM_LOCAL_ANTHROPIC_BETA_HEADERS": "True",
            "LITELLM_LOCAL_BLOG_POSTS": "True",
            "LITELLM_TELEMETRY": "False",
            "NO_DOCS": "True",
        },
        rewrites=True,
    )


# -- Portkey -------------------------------------------------------------------------------------


def portkey(site: Site) -> Contestant:
    node = shutil.which("node")
    if node is None:
        raise Unavailable("node is not installed")
    package = HOME / "portkey" / "node_modules" / "@portkey-ai" / "gateway"
    script = _installed(package / "build" / "start-server.js", "portkey")
    return Contestant(
        command=(node, str(script), "--headless", f"--port={site.port}"),
        ready_path="/",
        headers={
            **SOME_KEY,
            "x-portkey-provider": "openai",
            "x-portkey-custom-host": f"{site.upstream}/v1",
        },
        environ={"NODE_ENV": "production"},
        rewrites=True,
    )


def portkey_version() -> str:
    wanted = json.loads((PINS / "portkey" / "package.json").read_text())
    return str(wanted["dependencies"]["@portkey-ai/gateway"])


# -- any-llm -------------------------------------------------------------------------------------

_ANY_LLM = """
database_url: "sqlite:///{folder}/any-llm.db"
host: "127.0.0.1"
port: {port}
master_key: {master}
providers:
  openai:
    api_key: {key}
    api_base: "{upstream}/v1"
pricing:
  openai:gpt-4o-mini:
    input_price_per_million: 0.15
    output_price_per_million: 0.60
"""


def any_llm(site: Site) -> Contestant:
    program = _installed(HOME / "any-llm" / "bin" / "any-llm-gateway", "any-llm")
    config = site.folder / "config.yaml"
    config.write_text(
        _ANY_LLM.format(
            folder=site.folder,
            port=site.port,
            master=MASTER_KEY,
            key=UPSTREAM_KEY,
            upstream=site.upstream,
        )
    )

    def key() -> dict[str, str]:
        """A key of its own making, for a user of its own making: both live in its database."""
        asked = urllib.request.Request(
            f"http://127.0.0.1:{site.port}/v1/keys",
            data=json.dumps({"key_name": "bench", "user_id": "bench"}).encode(),
            headers={"Content-Type": "application/json", "X-AnyLLM-Key": f"Bearer {MASTER_KEY}"},
        )
        try:
            with urllib.request.urlopen(asked, timeout=30) as answer:
                return {"X-AnyLLM-Key": f"Bearer {json.load(answer)['key']}"}
        except urllib.error.URLError as error:
            raise Unavailable(f"it gave no key: {error}") from error

    return Contestant(
        command=(str(program), "serve", "--config", str(config), "--log-level", "40"),
        ready_path="/health/readiness",
        headers={},
        model="openai:gpt-4o-mini",
        rewrites=True,
        once_ready=key,
    )


ENTRANTS = (
    Entrant(
        "litellm",
        "LiteLLM proxy, one uvicorn worker, LITELLM_MODE=PRODUCTION, errors logged only, a master "
        "key, no database (so no budgets and no spend), its price map from the package",
        litellm,
        lambda: _pinned("litellm", "litellm"),
        PLAIN,
    ),
    Entrant(
        "portkey",
        "Portkey gateway on node, NODE_ENV=production, without its console; the upstream is named "
        "by headers; it knows no keys and no budgets of its own and writes no log",
        portkey,
        portkey_version,
        PLAIN,
    ),
    Entrant(
        "any-llm",
        "any-llm gateway, the last release that carried the server, one uvicorn worker, a key and "
        "a user of its own, prices, SQLite in place of the Postgres of its examples",
        any_llm,
        lambda: _pinned("any-llm", "any-llm-sdk"),
        PLAIN,
    ),
)


# -- the command ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Peer:
    install: Callable[[str], None]
    there: Path


PEERS = {
    "litellm": Peer(_python_packages, HOME / "litellm" / "bin" / "litellm"),
    "portkey": Peer(_node_packages, HOME / "portkey" / "node_modules"),
    "any-llm": Peer(_python_packages, HOME / "any-llm" / "bin" / "any-llm-gateway"),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.peers",
        description="Installs the gateways that gwproxy is measured with.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    install = commands.add_parser("install", help="into bench/.peers, each apart from the others")
    install.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PEERS))
    commands.add_parser("list", help="what is there")
    args = parser.parse_args()
    if args.command == "list":
        for name, peer in PEERS.items():
            print(f"{name}: {'installed' if peer.there.exists() else 'not installed'}")
        return 0
    if unknown := [name for name in args.names if name not in PEERS]:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(PEERS)}")
    HOME.mkdir(exist_ok=True)
    failed = False
    for name in args.names or PEERS:
        print(f"installing {name} ...", flush=True)
        try:
            PEERS[name].install(name)
        except (Unavailable, subprocess.CalledProcessError, OSError) as error:
            print(f"{name} was not installed: {error}", file=sys.stderr)
            failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
