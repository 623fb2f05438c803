"""Who takes part: one function a proxy, which writes what it needs and says how it is started.

A new contestant is one function and one line in the table at the end; the other AI gateways, which
have to be installed first, are in peers.py.
"""

import os
import re
import shutil
import subprocess
import sys
from importlib import metadata, util

from bench import peers
from bench.children import ROOT, environment
from bench.entrant import MODEL, SOME_KEY, Contestant, Entrant, Site, Unavailable

PYTHON = sys.executable

# -- nginx ---------------------------------------------------------------------------------------

_NGINX_TLS = """
            proxy_ssl_verify on;
            proxy_ssl_verify_depth 2;
            proxy_ssl_trusted_certificate {ca};
            proxy_ssl_name localhost;
            proxy_ssl_server_name on;
            proxy_ssl_protocols TLSv1.2 TLSv1.3;
            proxy_ssl_session_reuse on;"""

_NGINX = """
daemon off;
{user}
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log warn;
events {{ worker_connections {connections}; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    keepalive_requests 100000000;
    upstream provider {{
        server 127.0.0.1:{upstream_port};
        keepalive 256;
        keepalive_requests 100000000;
    }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location = /health {{ return 200 "ok"; }}
        location / {{
            proxy_pass {scheme}://provider;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host $host;
            proxy_buffering off;
            proxy_read_timeout 120s;{tls}
        }}
    }}
}}
"""


def _nginx_program() -> str:
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if program is None:
        raise Unavailable("nginx is not installed")
    return program


def nginx(site: Site) -> Contestant:
    program = _nginx_program()
    config = site.folder / "nginx.conf"
    config.write_text(
        _NGINX.format(
            # Started by root its worker would become `nobody`, who cannot enter the run's folder.
            user="user root;" if os.geteuid() == 0 else "",
            folder=site.folder,
            # Two for each stream, and the largest step has 5,000 of them.
            connections=16384,
            upstream_port=site.upstream_port,
            port=site.port,
            scheme="https" if site.ca else "http",
            tls=_NGINX_TLS.format(ca=site.ca) if site.ca else "",
        )
    )
    return Contestant(
        command=(program, "-p", str(site.folder), "-c", str(config)),
        ready_path="/health",
        headers=SOME_KEY,
    )


def nginx_version() -> str:
    said = subprocess.run(
        [_nginx_program(), "-v"], capture_output=True, text=True, timeout=10, check=False
    )
    found = re.search(r"nginx/(\S+)", said.stderr + said.stdout)
    return found.group(1) if found else "unknown"


# -- naive ---------------------------------------------------------------------------------------


def naive(site: Site) -> Contestant:
    ca = ("--ca", str(site.ca)) if site.ca else ()
    return Contestant(
        command=(
            *(PYTHON, "-m", "bench.naive"),
            *("--port", str(site.port), "--upstream", site.upstream, *ca),
        ),
        ready_path="/health",
        headers=SOME_KEY,
    )


def naive_version() -> str:
    return f"aiohttp {metadata.version('aiohttp')}"


# -- gwproxy -------------------------------------------------------------------------------------

_GWPROXY = """
[server]
listen = "127.0.0.1:{port}"

[admin]
key = "env:GWPROXY_ADMIN_KEY"

[upstream]
flavour = "openai"
base_url = "{upstream}/v1"
token = "env:BENCH_UPSTREAM_TOKEN"
{ca_line}

[storage]
path = "{folder}/gwproxy.db"
journal = "{folder}/journal"

[prices.models."{model}"]
input = "0.15"
output = "0.60"
"""


def gwproxy(site: Site) -> Contestant:
    """As a user would run it: budgets on organization, user and key, and no default changed."""
    if util.find_spec("gwproxy") is None or util.find_spec("gwproxy.__main__") is None:
        raise Unavailable("`python -m gwproxy` cannot be started from here")
    config = site.folder / "config.toml"
    config.write_text(
        _GWPROXY.format(
            port=site.port,
            upstream=site.upstream,
            ca_line=f'ca_file = "{site.ca}"' if site.ca else "",
            folder=site.folder,
            model=MODEL,
        )
    )
    environ = {
        "GWPROXY_ADMIN_KEY": "benchmark-admin-key-" + "0" * 24,
        "BENCH_UPSTREAM_TOKEN": "benchmark-upstream-token",
    }
    program = (PYTHON, "-m", "gwproxy")

    def run(*arguments: str) -> str:
        """One administrative command, before the server runs; what it prints."""
        command = (*program, *arguments, "--config", str(config))
        try:
            said = subprocess.run(
                command,
                cwd=ROOT,
                env=environment(environ),
                capture_output=True,
                text=True,
                timeout=30,
                check=True,
            )
        except subprocess.CalledProcessError as error:
            why = (error.stderr or error.stdout).strip().splitlines() or ["no word of why"]
            raise Unavailable(f"`gwproxy {' '.join(arguments)}`: {why[-1]}") from error
        except subprocess.TimeoutExpired as error:
            raise Unavailable(f"`gwproxy {' '.join(arguments)}` did not end") from error
        return said.stdout.strip()

    run("orgs", "create", "--id", "bench", "--name", "bench", "--monthly-budget-usd", "1000000")
    run(
        *("users", "create", "--id", "bench", "--org", "bench", "--email", "bench@example.com"),
        *("--monthly-limit-usd", "1000000"),
    )
    key = run("keys", "create", "--user", "bench")
    return Contestant(
        command=(*program, "serve", "--config", str(config)),
        ready_path="/health",
        headers={"Authorization": f"Bearer {key}"},
        environ=environ,
    )


def gwproxy_version() -> str:
    try:
        return metadata.version("gwproxy")
    except metadata.PackageNotFoundError:
        return "from this checkout"


ENTRANTS = (
    Entrant(
        "gwproxy",
        "nothing switched off, no default changed: authentication, prices, budgets on organization "
        "and user, the ledger on disk, metering, metrics and request log",
        gwproxy,
        gwproxy_version,
    ),
    Entrant(
        "nginx",
        "1 worker, proxy_pass, proxy_buffering off, keep-alive upstream, access_log off, "
        "proxy_ssl_verify on",
        nginx,
        nginx_version,
    ),
    Entrant(
        "naive",
        "aiohttp server and ClientSession on asyncio's own loop, no authentication, no metering, "
        "no log, certificates checked",
        naive,
        naive_version,
    ),
    *peers.ENTRANTS,
)
