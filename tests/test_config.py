"""Every key has its check, every error its file, its key and its cure, and no secret shows."""

import argparse
import copy
import dataclasses
import json
import os
import pickle
import re
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gwproxy.cli import check
from gwproxy.config import (
    FAMILIES,
    TABLES,
    ChainEntry,
    Config,
    ConfigError,
    Listen,
    Secret,
    find_config,
    keys_of,
    load,
)
from gwproxy.config.reader import Reader
from gwproxy.core.pricing import PriceBook
from gwproxy.core.routing import CATALOGUE

SHIPPED = Path(__file__).parent.parent / "config.toml"
EXAMPLE_ENV = SHIPPED.with_name(".env.example")
TOKEN = "cf-token-that-nobody-may-see"
CLOUDFLARE = {
    "CLOUDFLARE_ACCOUNT_ID": "acc0123",
    "CLOUDFLARE_GATEWAY_ID": "github-ai-agent",
    "CLOUDFLARE_API_TOKEN": TOKEN,
}
OTHER_NAMES = {
    "AI_GATEWAY_ACCOUNT_ID": "acc0123",
    "AI_GATEWAY_ID": "github-ai-agent",
    "AI_GATEWAY_TOKEN": TOKEN,
}
LOCAL = '[upstream]\nflavour = "openai"\nbase_url = "http://127.0.0.1:9000/v1"\n'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.toml"


def loaded(
    file: Path,
    text: str,
    environ: Mapping[str, str] | None = None,
    catalogue: Mapping[str, str] | None = None,
) -> Config:
    file.write_text(text)
    file.chmod(0o600)
    return load(file, environ or {}, catalogue=catalogue or {})


def refusal(file: Path, text: str, environ: Mapping[str, str] | None = None) -> list[str]:
    """The lines of the error, without the file's folder."""
    with pytest.raises(ConfigError) as caught:
        loaded(file, text, environ)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(caught.value.problems)
    return [line.replace(f"{file.parent}/", "") for line in lines]


# -- the shipped file ----------------------------------------------------------------------------


@pytest.mark.parametrize("names", [CLOUDFLARE, OTHER_NAMES], ids=["CLOUDFLARE_", "AI_GATEWAY_"])
def test_the_shipped_file_starts_with_the_three_variables_alone(names: dict[str, str]) -> None:
    config = load(SHIPPED, names, catalogue=CATALOGUE)
    assert config.warnings == ()
    assert config.upstream.root == "https://gateway.ai.cloudflare.com/v1/acc0123/github-ai-agent"
    assert config.upstream.token == Secret(TOKEN)
    assert config.admin.key is None
    assert {
        name: (one.prefix, one.rpm, one.daily_usd) for name, one in config.providers.items()
    } == {
        "gemini": ("google-ai-studio", 100, 10 * 10**9),
        "openai": ("openai", 50, 20 * 10**9),
        "anthropic": ("anthropic", 50, 20 * 10**9),
    }
    assert [entry.provider for entry in config.models["auto"].chain] == [
        "gemini",
        "openai",
        "anthropic",
    ]
    assert config.storage.path == SHIPPED.parent / "gwproxy.db"


def test_the_shipped_file_without_the_variables_names_them_and_points_to_make_run() -> None:
    with pytest.raises(ConfigError) as caught:
        load(SHIPPED, {})
    text = str(caught.value)
    assert len(caught.value.problems) == 1
    for name in (*CLOUDFLARE, *OTHER_NAMES, "make run", str(SHIPPED)):
        assert name in text


def test_one_missing_variable_is_named_and_the_two_others_are_not() -> None:
    environ = {name: value for name, value in CLOUDFLARE.items() if "TOKEN" not in name}
    with pytest.raises(ConfigError) as caught:
        load(SHIPPED, environ)
    assert "not set: CLOUDFLARE_API_TOKEN or AI_GATEWAY_TOKEN;" in str(caught.value)
    assert "ACCOUNT_ID" not in str(caught.value)


def test_every_key_is_in_the_shipped_file_with_a_comment() -> None:
    documented: set[tuple[str, str]] = set()
    table = ""
    for line in SHIPPED.read_text().splitlines():
        if header := re.fullmatch(r"(?:# )?\[([^]]+)\]", line):
            table = re.sub(r"^(providers|models|prices\.models)\..*$", r"\1.*", header[1])
        elif key := re.match(r"(?:# )?([a-z_]+) = .*?(  +# .+)?$", line):
            assert key[2], f"this line has no comment: {line}"
            documented.add((table, key[1]))
    assert documented == {(table, key) for table in TABLES for key in keys_of(table)}


def test_the_defaults_are_what_the_shipped_file_shows(file: Path) -> None:
    shown, plain = load(SHIPPED, CLOUDFLARE), loaded(file, "", CLOUDFLARE)
    for table in ("server", "upstream", "breaker", "quota", "failure", "log", "metrics", "limits"):
        assert getattr(shown, table) == getattr(plain, table)
    assert plain.storage == dataclasses.replace(
        shown.storage, path=file.parent / "gwproxy.db", journal=file.parent / "journal"
    )


def test_the_example_of_the_environment_is_read_and_holds_no_secret() -> None:
    text = EXAMPLE_ENV.read_text()
    variables = dict(re.findall(r"^(?:# )?([A-Z_]+)=(.*)$", text, re.MULTILINE))
    assert CLOUDFLARE.keys() | OTHER_NAMES.keys() <= variables.keys()
    assert not any(variables[name] for name in variables if re.search("TOKEN|KEY|ACCOUNT", name))
    # Copied and filled in, it works as it stands: empty variables are as good as unset ones.
    written = dict(re.findall(r"^([A-Z_]+)=(.*)$", text, re.MULTILINE))
    filled = {"CLOUDFLARE_ACCOUNT_ID": "acc", "CLOUDFLARE_API_TOKEN": TOKEN}
    assert load(SHIPPED, written | filled).upstream.gateway_id == "default"


# -- finding and reading the file ----------------------------------------------------------------


def test_a_named_file_wins_over_the_variable_and_that_over_the_usual_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.toml").touch()
    environ = {"GWPROXY_CONFIG": "/b.toml"}
    assert find_config("/a.toml", environ) == Path("/a.toml")
    assert find_config(None, environ) == Path("/b.toml")
    assert find_config(None, {}) == Path("config.toml")


def test_no_file_at_all_says_how_to_name_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "gwproxy.config.loading.CONFIG_PATHS", (Path("config.toml"), tmp_path / "none")
    )
    with pytest.raises(ConfigError, match="name one by --config FILE or GWPROXY_CONFIG"):
        find_config(None, {})
    with pytest.raises(ConfigError, match="does not exist; name one by --config FILE"):
        load(tmp_path / "none", {})
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path, {})


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"[server]\nlisten = \n", "config.toml: line 2: the file is not valid TOML ("),
        (b"[server\n", "config.toml: line 1: the file is not valid TOML ("),
        (b"[server]\n[server]\n", "config.toml: line 2: the file is not valid TOML ("),
        (b'a = "\n\n', "config.toml: line 1: the file is not valid TOML ("),
        (b"a = [1,\n", "config.toml: line 2: the file is not valid TOML ("),
        (b"# \xc3\xa9\n# \xff\n", "config.toml: line 2: the file is not UTF-8; save it as UTF-8"),
        (b"x = " + b"9" * 5000, "config.toml: the file is not valid TOML; see https://toml.io"),
        (b"x = " + b"[" * 50_000, "config.toml: the file is not valid TOML"),
        (b"#" * ((1 << 20) + 1), "config.toml: the file is larger than 1 MiB"),
    ],
)
def test_a_file_that_is_not_toml_is_told_by_its_line(file: Path, data: bytes, said: str) -> None:
    file.write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        load(file, {})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_problems_are_told_at_once_one_a_line(file: Path) -> None:
    lines = refusal(
        file,
        LOCAL
        + """
        [server]
        lisen = "127.0.0.1:1"
        drain_s = -1
        [limts]
        max_body_bytes = 1
        [failure]
        mode = "ajar"
        """,
        {"GWPROXY__LOG__LEVEL": "loud"},
    )
    assert sorted(lines) == [
        'config.toml: failure.mode: "ajar" is not known; write one of "open", "closed"',
        "config.toml: limts: is not a table of the configuration; did you mean [limits]?",
        "config.toml: server.drain_s: -1 is out of range; write a number from 0 to 3600",
        'config.toml: server.lisen: is not a key of this table; did you mean "listen"?',
        'environment: GWPROXY__LOG__LEVEL: "loud" is not known; '
        'write one of "debug", "info", "warning", "error"',
    ]


# -- each value ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "line", "said"),
    [
        ("server", "listen = 8080", "server.listen: must be text, not a number; put it in quotes"),
        ("server", 'listen = "8080"', 'server.listen: "8080" is not an address to listen on; '),
        ("server", 'listen = ":8080"', 'write "127.0.0.1:8080"'),
        ("server", 'listen = "::1:8080"', 'write "127.0.0.1:8080", "[::1]:8080"'),
        ("server", 'listen = "[::zz]:80"', "is not an address to listen on"),
        ("server", 'listen = "[1:2:3]:80"', "is not an address to listen on"),
        ("server", 'listen = "a:65536"', "port 65536 is out of range; write a number from 0 to"),
        ("server", 'listen = "unix:gw.sock"', "write an absolute path of at most 107 bytes"),
        ("server", f'listen = "unix:/{"a" * 107}"', "is not a socket's path"),
        ("server", 'listen = "fd:2"', "file descriptors 0 to 2 are not sockets; inherited ones"),
        ("server", 'listen = "a\\nb:1"', 'server.listen: "a\\nb:1" is not an address'),
        ("server", "chat_alias = 1", "server.chat_alias: must be true or false, not 1; write true"),
        ("server", 'drain_s = "30"', 'server.drain_s: must be a number, not "30"'),
        ("server", "drain_s = nan", "server.drain_s: must be a number, not NaN"),
        ("server", "drain_s = inf", "server.drain_s: must be a number, not Infinity"),
        ("server", "drain_s = true", "server.drain_s: must be a number, not true"),
        ("server", "drain_s = 1e400", "a number of absurd size is out of range"),
        ("server", "drain_s = 2026-01-01", "must be a number, not a date or time"),
        ("server", "max_body_bytes = 1", "is not a key of this table; it belongs to [limits]"),
        ("server", "zzz = 1", "server.zzz: is not a key of this table; known: listen, drain_s,"),
        ("server", '"z.z" = 1', 'server."z.z": is not a key of this table'),
        ("admin", 'listen = "127.0.0.1:8080"', "is the address of server.listen too (127.0.0.1:80"),
        ("admin", 'api_key = "x"', "admin.api_key: is not a key of this table; did you mean"),
        ("breaker", "failure_threshold = 0", "write a number from 1 to 1000"),
        ("breaker", "failure_threshold = true", "must be a whole number, not true"),
        ("breaker", "failure_threshold = 3.0", "must be a whole number, not 3.0"),
        ("breaker", f"failure_threshold = {10**30}", "a huge number is out of range"),
        ("breaker", "open_timeout_ms = 0", "breaker.open_timeout_ms: 0 is out of range"),
        ("quota", "default_max_output_tokens = 0", "0 is out of range; write a number from 1"),
        (
            "quota",
            'alert_webhook = "http://hooks.example/x"',
            "must begin with https:// (http:",
        ),
        ("quota", 'alert_webhook = "ftp://127.0.0.1/x"', "must begin with https://"),
        ("quota", 'alert_webhook = "https://u:p@hooks.example/x"', "has a user name or password"),
        ("quota", 'alert_webhook = "https://hooks.example/a b"', "is not an address"),
        ("quota", 'alert_webhook = "https:///x"', "is not an address"),
        ("failure", 'fallback_daily_limit_usd = "five"', '"five" is not an amount of money (must '),
        (
            "failure",
            "fallback_daily_limit_usd = -1",
            "-1 is not an amount of money (must not be ne",
        ),
        (
            "failure",
            "fallback_daily_limit_usd = true",
            "must be an amount, not true or false; writ",
        ),
        ("failure", "fallback_daily_limit_usd = 0.0000000001", "more than 9 decimals"),
        ("storage", 'synchronous = "off"', '"off" is not known; write one of "normal", "full"'),
        ("storage", 'path = ""', "storage.path: is not a path; name a file or folder"),
        ("storage", 'journal = "."', "storage.journal: is the database's own path or folder; give"),
        ("storage", 'journal = "gwproxy.db"', "is the database's own path or folder"),
        ("storage", "keep_backups = 0", "storage.keep_backups: 0 is out of range"),
        ("limits", "max_body_bytes = 10", "limits.max_body_bytes: 10 is out of range; write a num"),
        ("limits", "header_timeout_s = 0", "limits.header_timeout_s: 0 is out of range"),
        ("metrics", 'open = "true"', 'metrics.open: must be true or false, not "true"'),
        ("providers.Gemini", "rpm = 1", "providers.Gemini: is not a provider's name; use at most"),
        ("providers.a", "rpm = 0", "providers.a.rpm: 0 is out of range"),
        (
            "providers.a",
            'prefix = "openai/"',
            '"openai/" has the wrong form; write what stands bef',
        ),
        ("providers.a", 'model = "two words"', "providers.a.model: "),
        (
            "providers.a",
            'max_tokens_field = "n"',
            'write one of "max_tokens", "max_completion_toke',
        ),
        (
            "providers.a",
            'flavour = "grpc"',
            '"grpc" is not known; write one of "cloudflare-compat"',
        ),
        (
            "providers.a",
            'flavour = "cloudflare-rest"',
            "the flavour cloudflare-rest needs a token here and both ids in [upstream]; add",
        ),
        (
            "providers.a",
            'flavour = "cloudflare-compat"',
            "the flavour cloudflare-compat needs a token here and both ids in [upstream]; add",
        ),
        (
            "prices",
            'input = "1"',
            'prices.input: is not a key of [prices]; write [prices.models."p',
        ),
        (
            'prices.models."a/b"',
            'input = "1"',
            'prices.models."a/b".output: is missing; add output',
        ),
        ('prices.models."a/b"', "input = 1e-9", "is not a price (must not have more than 6 decim"),
        (
            'prices.models."a/b"',
            "input = [1]",
            "must be a price, not a list; write USD per million",
        ),
        (
            'prices.models."/b"',
            "input = 1\noutput = 1",
            "is not a model's name; write \"provider/mod",
        ),
        (
            'models."a b"',
            'chain = ["x"]',
            'models."a b": is not a model\'s name; use visible ASCII',
        ),
        ("models.m", "chain = []", "must be a list with at least one provider; write chain = ["),
        ("models.m", 'chain = "a"', "models.m.chain: must be a list"),
        ("models.m", "chain = [1]", "models.m.chain: entry 1 is a number"),
        (
            "models.m",
            'chain = ["nope"]',
            'there is no provider "nope"; add a table [providers.NAME',
        ),
        ("models.m", f"chain = {['x'] * 33}", "has more than 32 entries; shorten it"),
        ("models.m", 'chain = [{ provder = "x" }]', 'key "provder"; did you mean "provider"?'),
        ("models.m", 'chain = [{ model = "x" }]', "entry 1 needs a provider's name as text"),
        (
            "models.m",
            'chain = [{ provider = "x", weight = -1 }]',
            "entry 1: weight -1 is out of ra",
        ),
        (
            "models.m",
            "chains = []",
            'models.m.chains: is not a key of this table; did you mean "ch',
        ),
        ("models.m", "", "models.m.chain: is missing; add chain = ... to [models.m]"),
    ],
)
def test_a_wrong_value_is_told_with_its_key_and_its_cure(
    file: Path, table: str, line: str, said: str
) -> None:
    lines = refusal(file, f"{LOCAL}[{table}]\n{line}\n")
    assert any(said in one for one in lines), lines


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("server = 1", "config.toml: server: must be a table, not a number; write [server]"),
        (
            "listen = 'x:1'",
            "config.toml: listen: is not a key of the configuration; put it into it",
        ),
        ("max_body_bytes = 1", "is not a key of the configuration; it belongs to [limits]"),
        ("[[providers.a]]", "config.toml: providers.a: must be a table, not a list; write [provid"),
        ("prices = 'x'", "config.toml: prices: must be a table, not text; write [prices]"),
        ("[fallback]", "fallback: is not a table of the configuration; known: server, admin, ups"),
    ],
)
def test_a_thing_in_the_wrong_place_is_told(file: Path, text: str, said: str) -> None:
    lines = refusal(file, f"{text}\n{LOCAL}")
    assert any(said in line for line in lines), lines


@pytest.mark.parametrize(
    ("written", "listen"),
    [
        ("127.0.0.1:8080", Listen("tcp", host="127.0.0.1", port=8080)),
        ("[::1]:0", Listen("tcp", host="::1", port=0)),
        ("gw.example:443", Listen("tcp", host="gw.example", port=443)),
        ("unix:/run/gw.sock", Listen("unix", path="/run/gw.sock")),
        ("fd:3", Listen("fd", fd=3)),
    ],
)
def test_a_listener_is_read_and_written_the_same(file: Path, written: str, listen: Listen) -> None:
    config = loaded(file, f'{LOCAL}[server]\nlisten = "{written}"\n')
    assert config.server.listen == listen
    assert str(listen) == written


def test_two_listeners_may_both_take_any_free_port(file: Path) -> None:
    ports = '[server]\nlisten = "127.0.0.1:0"\n[admin]\nlisten = "127.0.0.1:0"\n'
    assert loaded(file, LOCAL + ports).admin.listen == Listen("tcp", host="127.0.0.1")


def test_money_is_read_exactly(file: Path) -> None:
    config = loaded(
        file,
        LOCAL
        + """
        [failure]
        fallback_daily_limit_usd = 0.1
        [providers.a]
        daily_usd = "0.000000001"
        [prices.models."a/b"]
        input = 0.1
        output = "0.30"
        cache_read = 0
        [prices.models."a/*"]
        input = 1
        output = 1
        reasons = true
        """,
    )
    assert config.failure.fallback_daily_limit_usd == 100_000_000
    assert config.providers["a"].daily_usd == 1
    price = config.prices.models["a/b"]
    assert (price.input, price.output) == (Decimal("0.1"), Decimal("0.30"))
    assert (price.cache_read, price.cache_write) == (Decimal(0), None)
    # The price book takes the rows as they are.
    table = {"version": "none", "aliases": {}, "providers": {}}
    PriceBook(table, {name: one.row() for name, one in config.prices.models.items()})


def test_relative_paths_are_in_the_state_directory_else_beside_the_file(file: Path) -> None:
    beside = loaded(file, LOCAL + '[storage]\njournal = "/var/journal"\n').storage
    assert (beside.path, beside.journal) == (file.parent / "gwproxy.db", Path("/var/journal"))
    state = loaded(file, LOCAL, {"STATE_DIRECTORY": "/var/lib/gw:/var/lib/other"}).storage
    assert (state.path, state.journal) == (
        Path("/var/lib/gw/gwproxy.db"),
        Path("/var/lib/gw/journal"),
    )


def test_a_certificate_file_is_beside_the_file_and_has_to_exist(file: Path) -> None:
    text = LOCAL + 'ca_file = "ca.pem"\n'
    assert "upstream.ca_file: there is no file" in refusal(file, text)[0]
    (file.parent / "ca.pem").touch()
    assert loaded(file, text, {"STATE_DIRECTORY": "/x"}).upstream.ca_file == file.parent / "ca.pem"


# -- the upstream --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftp://x/v1", "must begin with http:// or https://"),
        ("127.0.0.1:9000", "must begin with http:// or https://"),
        ("https:///v1", "is not an address"),
        ("https://x:99999/v1", "is not an address"),
        ("https://x y/v1", "is not an address"),
        ("https://[::1/v1", "is not an address"),
        ("https://user:hunter2@x/v1", "has a user name or password in it; put the secret into"),
        ("https://hunter2@x/v1", "has a user name or password in it; put the secret into"),
        ("https://x/v1?key=hunter2", "has a query or a fragment"),
        ("https://x/v1?", "has a query or a fragment"),
        ("https://x/v1#hunter2", "has a query or a fragment"),
        ("https://x/v1/chat/completions", "ends in /chat/completions, which is appended; write"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused_and_not_repeated(
    file: Path, url: str, said: str
) -> None:
    (line,) = refusal(file, f'[upstream]\nflavour = "openai"\nbase_url = "{url}"\n')
    assert line.startswith("config.toml: upstream.base_url: ") and said in line
    assert "hunter2" not in line


def test_a_base_url_stands_in_for_the_ids(file: Path) -> None:
    openai = loaded(file, LOCAL).upstream
    assert (openai.root, openai.account_id, openai.token) == (
        "http://127.0.0.1:9000/v1",
        None,
        None,
    )
    compat = loaded(file, '[upstream]\nbase_url = "https://x/"\n').upstream
    assert (compat.flavour, compat.root) == ("cloudflare-compat", "https://x")


def test_an_address_that_ends_in_compat_is_a_mistake_for_one_flavour_only(file: Path) -> None:
    url = 'base_url = "https://x/compat"\n'
    assert "upstream.base_url: ends in /compat" in refusal(file, f"[upstream]\n{url}")[0]
    assert loaded(file, f'[upstream]\nflavour = "openai"\n{url}').upstream.root.endswith("/compat")


def test_the_openai_flavour_needs_an_address(file: Path) -> None:
    (line,) = refusal(file, '[upstream]\nflavour = "openai"\n')
    assert 'upstream.base_url: is missing: the flavour "openai" has no address of its own' in line
    (line,) = refusal(file, '[providers.a]\nflavour = "openai"\n', CLOUDFLARE)
    assert line.startswith("config.toml: providers.a.base_url: is missing")


def test_the_rest_flavour_has_an_address_of_its_own(file: Path) -> None:
    upstream = loaded(file, '[upstream]\nflavour = "cloudflare-rest"\n', CLOUDFLARE).upstream
    assert upstream.root == "https://api.cloudflare.com/client/v4/accounts/acc0123/ai/v1"
    # Beside the gateway's other address it takes the same token: both are Cloudflare's.
    both = loaded(file, '[providers.a]\nflavour = "cloudflare-rest"\n', CLOUDFLARE)
    assert both.providers["a"].root == upstream.root
    assert both.providers["a"].token == both.upstream.token
    (line,) = refusal(
        file, '[providers.a]\nflavour = "cloudflare-rest"\nprefix = "custom-hf"\n', CLOUDFLARE
    )
    assert "custom providers are not on the REST API; write flavour" in line


@pytest.mark.parametrize(
    ("host", "warned"),
    [
        ("localhost", False),
        ("demo.localhost", False),
        ("127.8.8.8", False),
        ("[::1]", False),
        ("10.0.0.1", True),
        ("gateway.example", True),
        ("127.0.0.1.example", True),
    ],
)
def test_clear_text_to_another_machine_is_warned_of(file: Path, host: str, warned: bool) -> None:
    url = f'flavour = "openai"\nbase_url = "http://{host}:9000"\n'
    config = loaded(file, f"[upstream]\n{url}[providers.a]\n{url}")
    assert [warning.split(" is ")[0] for warning in config.warnings] == (
        ["upstream.base_url", "providers.a.base_url"] if warned else []
    )


def test_cloudflares_token_is_not_sent_to_another_server_unasked(file: Path) -> None:
    text = """
    [providers.cloud]
    [providers.own]
    base_url = "https://other.example/v1"
    flavour = "openai"
    [providers.paid]
    base_url = "https://third.example/v1"
    token = "env:PAID"
    """
    config = loaded(file, text, CLOUDFLARE | {"PAID": "paid-token"})
    assert config.providers["cloud"].token == Secret(TOKEN)
    assert config.providers["own"].token is None
    assert config.providers["paid"].token == Secret("paid-token")
    assert config.warnings == (
        "providers.own has a base_url of its own but no token: requests go there without one",
    )
    assert loaded(file, LOCAL, CLOUDFLARE).upstream.token is None


def test_a_provider_inherits_the_flavour_and_the_address(file: Path) -> None:
    config = loaded(
        file,
        LOCAL
        + """token = "shared"
        [providers.a]
        [providers.b]
        base_url = "http://127.0.0.1:9000/other"
        [providers.c]
        base_url = "http://127.0.0.1:9001"
        flavour = "cloudflare-compat"
        """,
    )
    seen = {
        name: (provider.flavour, provider.root, provider.token and provider.token.reveal())
        for name, provider in config.providers.items()
    }
    assert seen == {
        "a": ("openai", "http://127.0.0.1:9000/v1", "shared"),
        "b": ("openai", "http://127.0.0.1:9000/other", "shared"),
        "c": ("cloudflare-compat", "http://127.0.0.1:9001", None),
    }


def test_a_model_that_repeats_its_prefix_is_warned_of(file: Path) -> None:
    config = loaded(file, LOCAL + '[providers.a]\nprefix = "openai"\nmodel = "openai/gpt-4o"\n')
    assert config.warnings == (
        "providers.a.model repeats the prefix: the upstream is asked for openai/openai/gpt-4o",
    )


@pytest.mark.parametrize(
    "text",
    [
        'openai_api_key = "sk-live-123"',
        '[upstream]\napi_key = "sk-live-123"',
        '[providers.openai]\napi_key = "sk-live-123"',
        '[providers.openai]\nOPENAI_API_KEY = "sk-live-123"',
        '[providers]\nanthropic_api_key = "sk-live-123"',
        '[providers.openai.api_keys]\nfirst = "sk-live-123"',
        '[providers.openai]\ntoken = "sk-live-123"',
        '[upstream]\ntoken = "sk-live-123"',
    ],
)
def test_a_providers_key_is_refused_and_sent_to_where_it_belongs(file: Path, text: str) -> None:
    lines = refusal(file, text, CLOUDFLARE)
    assert len(lines) == 1
    assert "Cloudflare (AI Gateway, Provider Keys" in lines[0]
    assert "sk-live" not in lines[0]


def test_a_providers_own_key_is_right_where_its_own_server_is_asked(file: Path) -> None:
    text = '[providers.hf]\nflavour = "openai"\nbase_url = "https://hf.example"\ntoken = "hf_abc"\n'
    assert loaded(file, text, CLOUDFLARE).providers["hf"].token == Secret("hf_abc")


# -- secrets -------------------------------------------------------------------------------------


@given(st.text(min_size=8))
def test_a_secret_never_shows(value: str) -> None:
    secret = Secret(value)
    shown = f"{secret} {secret!r} {secret!s} {[secret]} {vars(Secret)}"
    assert value not in shown
    assert secret.reveal() == value
    assert secret == Secret(value) and secret != Secret(value + "x") and secret != value
    assert len({secret, Secret(value)}) == 1


def test_a_secret_cannot_be_pickled_or_changed() -> None:
    with pytest.raises(TypeError):
        pickle.dumps(Secret("x"))
    with pytest.raises(TypeError):
        copy.copy(Secret("x"))
    assert not hasattr(Secret("x"), "__dict__")


def test_a_loaded_configuration_shows_no_secret(file: Path) -> None:
    key = "k" * 40
    config = loaded(
        file, "[providers.a]\ntoken = 'own-token-1'\n", CLOUDFLARE | {"GWPROXY_ADMIN_KEY": key}
    )
    shown = repr(config) + str(config)
    for secret in (TOKEN, key, "own-token-1"):
        assert secret not in shown
    assert config.admin.key is not None and config.admin.key.reveal() == key


def test_a_secret_comes_from_a_variable_a_file_or_a_credential(file: Path) -> None:
    (file.parent / "token").write_text("from-a-file\r\n")
    named = LOCAL + 'token = "{}"\n'
    assert loaded(file, named.format("env:MINE"), {"MINE": "a"}).upstream.token == Secret("a")
    expected = Secret("from-a-file")
    assert loaded(file, named.format("file:token")).upstream.token == expected
    assert loaded(file, named.format(f"file:{file.parent}/token")).upstream.token == expected
    environ = {"CREDENTIALS_DIRECTORY": str(file.parent)}
    assert loaded(file, named.format("credential:token"), environ).upstream.token == expected
    assert (
        loaded(file, LOCAL, {"GWPROXY__UPSTREAM__TOKEN": "file:token"}).upstream.token == expected
    )


@pytest.mark.parametrize(
    ("token", "said"),
    [
        ("env:MINE", "the environment variable MINE is not set; set it, or write the secret as"),
        ("env:EMPTY", "the environment variable EMPTY is not set"),
        ("env:", '"env:" names nothing; write env:NAME'),
        ("file:none", "cannot be read (No such file or directory); check its path and permissions"),
        ("file:empty", "empty is empty; put the secret into it"),
        ("file:binary", "binary is not text; put the secret alone into it"),
        ("file:large", "large is larger than 64 KiB"),
        ("file:lines", "the token is empty or has characters that no header can carry; copy it ag"),
        (
            "credential:token",
            "credential:token needs $CREDENTIALS_DIRECTORY, which is not set; sta",
        ),
        ("Bearer hidden-word", 'the token begins with "Bearer "; write the token alone'),
        ("hidden-word\\r\\nx-evil: 1", "has characters that no header can carry"),
        ("hidden-wörd", "has characters that no header can carry"),
        ("", "the token is empty"),
    ],
)
def test_a_secret_that_cannot_be_had_is_told_without_showing_anything(
    file: Path, token: str, said: str
) -> None:
    (file.parent / "empty").write_text("\n")
    (file.parent / "binary").write_bytes(b"\xff\xfe")
    (file.parent / "large").write_text("x" * 70_000)
    (file.parent / "lines").write_text("hidden-word\nsecond\n")
    (line,) = refusal(file, f'{LOCAL}token = "{token}"\n', {"EMPTY": ""})
    assert line.startswith("config.toml: upstream.token: ") and said in line
    assert "hidden" not in line


def test_a_credential_stays_in_its_folder(file: Path) -> None:
    environ = {"CREDENTIALS_DIRECTORY": str(file.parent / "inner")}
    (line,) = refusal(file, LOCAL + 'token = "credential:../token"\n', environ)
    assert "a credential's name has no slash" in line


def test_a_token_that_is_no_text_is_not_shown(file: Path) -> None:
    (line,) = refusal(file, LOCAL + "token = 12345678\n")
    assert "must be text, not a number" in line and "12345678" not in line


def test_a_token_in_the_place_of_an_id_is_not_shown(file: Path) -> None:
    swapped = CLOUDFLARE | {"CLOUDFLARE_GATEWAY_ID": "Hidden.Token"}
    (line,) = refusal(file, "", swapped)
    assert "upstream.gateway_id: does not look like an id; write at most 64" in line
    assert "Hidden" not in line


@pytest.mark.parametrize(
    ("gateway", "fine"),
    [
        ("a", True),
        ("github-ai-agent", True),
        ("my_gw", True),
        ("a" * 64, True),
        ("a" * 65, False),
        ("a--b", False),
        ("-a", False),
        ("a-", False),
        ("A", False),
        ("a/b", False),
        ("a\n", True),  # what an editor adds is taken away
    ],
)
def test_a_gateways_id_has_cloudflares_form(file: Path, gateway: str, fine: bool) -> None:
    environ = CLOUDFLARE | {"CLOUDFLARE_GATEWAY_ID": gateway}
    if fine:
        assert loaded(file, "", environ).upstream.gateway_id == gateway.strip()
    else:
        assert "gateway_id" in refusal(file, "", environ)[0]


def test_the_admin_key_is_off_long_enough_or_an_error(file: Path) -> None:
    written = LOCAL + '[admin]\nkey = "env:GWPROXY_ADMIN_KEY"\n'
    for text in (LOCAL, written):
        assert loaded(file, text).admin.key is None
        assert loaded(file, text, {"GWPROXY_ADMIN_KEY": ""}).admin.key is None
        environ = {"GWPROXY_ADMIN_KEY": "k" * 32}
        assert loaded(file, text, environ).admin.key == Secret("k" * 32)
        (line,) = refusal(file, text, {"GWPROXY_ADMIN_KEY": "k" * 31})
        assert "admin.key: the admin key has fewer than 32 characters; make one with" in line
        assert "kkk" not in line
    (line,) = refusal(file, LOCAL + '[admin]\nkey = "env:OTHER"\n')
    assert "admin.key: the environment variable OTHER is not set" in line


def test_a_secret_in_a_file_that_others_can_read_is_warned_of(file: Path) -> None:
    text = LOCAL + 'token = "literal"\n'
    assert loaded(file, text).warnings == ()
    for mode in (0o640, 0o604):
        file.chmod(mode)
        (warning,) = load(file, {}).warnings
        assert "upstream.token" in warning and "chmod 600" in warning and "literal" not in warning
    loaded(file, LOCAL + 'token = "env:T"\n', {"T": "t"})
    file.chmod(0o644)
    assert load(file, {"T": "t"}).warnings == ()
    assert load(file, {"GWPROXY__UPSTREAM__TOKEN": "literal"}).warnings == ()


# -- the environment -----------------------------------------------------------------------------


def test_the_environment_alone_is_enough() -> None:
    config = load(None, CLOUDFLARE | {"GWPROXY__PROVIDERS__OPENAI__MODEL": "gpt-4o-mini"})
    assert config.file is None
    assert config.providers["openai"].model == "gpt-4o-mini"
    with pytest.raises(ConfigError, match=r"^environment: upstream: not set: "):
        load(None, {})


@pytest.mark.parametrize("key", ["account_id", "gateway_id", "token"])
def test_two_names_that_disagree_are_an_error(file: Path, key: str) -> None:
    first, second = FAMILIES[key]
    assert loaded(file, "", CLOUDFLARE | OTHER_NAMES)
    lines = refusal(file, "", CLOUDFLARE | OTHER_NAMES | {second: "something-else"})
    assert lines == [
        f"environment: {first} and {second}: are set to different values; "
        "unset one of them: they are two names of the same thing"
    ]


def test_either_name_is_found_whichever_the_file_names(file: Path) -> None:
    text = '[upstream]\ntoken = "env:AI_GATEWAY_TOKEN"\naccount_id = "written"\n'
    upstream = loaded(file, text, CLOUDFLARE).upstream
    assert (upstream.token, upstream.account_id) == (Secret(TOKEN), "written")


SAMPLES: dict[tuple[str, str], tuple[str, str]] = {
    # table, key: as TOML writes it, as the environment does
    ("server", "listen"): ('"[::1]:99"', "[::1]:99"),
    ("server", "drain_s"): ("1.5", "1.5"),
    ("server", "chat_alias"): ("true", "TRUE"),
    ("admin", "key"): (f'"{"a" * 32}"', "a" * 32),
    ("admin", "listen"): ('"unix:/a"', "unix:/a"),
    ("upstream", "flavour"): ('"openai"', "openai"),
    ("upstream", "account_id"): ('"Abc_1"', "Abc_1"),
    ("upstream", "gateway_id"): ('"gw"', "gw"),
    ("upstream", "token"): ('"tok"', "tok"),
    ("upstream", "base_url"): ('"https://x/"', "https://x/"),
    ("quota", "alert_webhook"): ('"https://hooks.example/a?b=c"', "https://hooks.example/a?b=c"),
    ("quota", "alert_webhook_secret"): ('"tok"', "tok"),
    ("upstream", "ca_file"): ('"config.toml"', "config.toml"),
    ("upstream", "retries"): ("3", "3"),
    ("upstream", "api_url"): ('"https://x/"', "https://x/"),
    ("upstream", "api_token"): ('"tok3"', "tok3"),
    ("providers.*", "prefix"): ('"workers-ai"', "workers-ai"),
    ("providers.*", "model"): ('"@cf/a/b"', "@cf/a/b"),
    ("providers.*", "daily_usd"): ("0.1", "0.1"),
    ("providers.*", "base_url"): ('"https://y"', "https://y"),
    ("providers.*", "flavour"): ('"openai"', "openai"),
    ("providers.*", "token"): ('"tok2"', "tok2"),
    ("providers.*", "max_tokens_field"): ('"max_tokens"', "max_tokens"),
    ("models.*", "chain"): ('["p-1", {provider="q", model="m", weight=1}]', ""),
    ("failure", "mode"): ('"open"', "open"),
    ("failure", "fallback_daily_limit_usd"): ('"7.5"', "7.5"),
    ("prices.models.*", "input"): ('"0.075"', "0.075"),
    ("prices.models.*", "output"): ("0.3", "0.3"),
    ("prices.models.*", "cache_read"): ("1", "1"),
    ("prices.models.*", "cache_write"): ("1", "1"),
    ("prices.models.*", "reasons"): ("true", "true"),
    ("storage", "path"): ('"/d/x.db"', "/d/x.db"),
    ("storage", "journal"): ('"j"', "j"),
    ("storage", "synchronous"): ('"full"', "full"),
    ("storage", "journal_segment_bytes"): ("2097152", "2097152"),
    ("storage", "journal_max_bytes"): ("2147483648", "2147483648"),
    ("log", "level"): ('"debug"', "debug"),
    ("metrics", "open"): ("true", "true"),
}
NAMES = {"providers.*": "p-1", "models.*": "m", "prices.models.*": "a/b-1.5"}


@pytest.mark.parametrize(
    ("table", "key"), [(table, key) for table in TABLES for key in keys_of(table)]
)
def test_each_key_means_the_same_in_the_file_and_in_the_environment(
    file: Path, table: str, key: str
) -> None:
    written, text = SAMPLES.get((table, key), ("5000", "5000"))
    if key == "chain":
        text = written
    steps = [*table.removesuffix(".*").split("."), *([NAMES[table]] if table in NAMES else [])]
    base = {
        ("upstream", "base_url"): '"http://127.0.0.1:1"',
        ("providers.p-1", "prefix"): '"a"',
        ("providers.p-1", "model"): '"b"',
        ("providers.p-1", "base_url"): '"http://127.0.0.1:2"',
        ("providers.q", "rpm"): "1",
        ("models.m", "chain"): '["p-1"]',
        ('prices.models."a/b-1.5"', "input"): "2",
        ('prices.models."a/b-1.5"', "output"): "2",
        ("breaker", "failure_threshold"): "9",
    }
    place = ".".join(step if re.fullmatch(r"[\w-]+", step) else f'"{step}"' for step in steps)
    if key in (
        "failure_threshold",
        "success_threshold",
        "keep_backups",
        "keep_months",
        "connect_timeout_s",
    ):
        written = text = "17"

    def toml(values: dict[tuple[str, str], str]) -> str:
        tables = dict.fromkeys(name for name, _ in values)
        return "\n".join(
            "\n".join(
                [
                    f"[{name}]",
                    *(f"{key} = {value}" for (own, key), value in values.items() if own == name),
                ]
            )
            for name in tables
        )

    if key in ("first_byte_timeout_s", "idle_timeout_s", "early_commit_s", "idle_connection_s"):
        written = text = "0.25" if key != "early_commit_s" else "3"
    if key.endswith("timeout_s") and table == "limits":
        written = text = "3600"
    in_file = loaded(file, toml(base | {(place, key): written}))
    variable = "__".join(["GWPROXY", *(re.sub(r"[^A-Za-z0-9]", "_", step) for step in steps), key])
    for spelling in (variable.upper(), variable):
        in_environment = loaded(file, toml(base), {spelling: text})
        assert in_environment == dataclasses.replace(in_file, warnings=in_environment.warnings)
    assert in_file != loaded(file, toml(base))


@given(rpm=st.integers(1, 10**8), other=st.integers(1, 10**8))
def test_the_environment_wins_over_the_file(
    tmp_path_factory: pytest.TempPathFactory, rpm: int, other: int
) -> None:
    file = tmp_path_factory.getbasetemp() / "override.toml"
    text = f"{LOCAL}[providers.gemini]\nrpm = {other}\n"
    config = loaded(file, text, {"GWPROXY__PROVIDERS__GEMINI__RPM": str(rpm)})
    assert config == loaded(file, text.replace(f"rpm = {other}", f"rpm = {rpm}"))


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        (
            "GWPROXY__SERVR__LISTEN",
            "x",
            "names no key of the configuration; did you mean GWPROXY__S",
        ),
        ("GWPROXY__SERVER__LISTN", "x", "did you mean GWPROXY__SERVER__LISTEN?"),
        ("GWPROXY__DRAIN_S", "x", "did you mean GWPROXY__SERVER__DRAIN_S?"),
        ("GWPROXY__PROVIDERS__GEMINI__RMP", "1", "did you mean GWPROXY__PROVIDERS__GEMINI__RPM?"),
        ("GWPROXY__LISTENERS__OPEN", "1", "did you mean GWPROXY__METRICS__OPEN?"),
        ("GWPROXY__", "1", "names no key of the configuration"),
        ("GWPROXY__QQ", "1", "names no key of the configuration; write GWPROXY__TABLE__KEY"),
        ("GWPROXY__PRICES__X__INPUT", "1", "names no key of the configuration; write GWPROXY__T"),
        ("GWPROXY__PROVIDERS__GEMNI__RPM", "1", "there is no [providers.gemni] with a prefix, mod"),
        ("GWPROXY__PROVIDERS__GEMNI__RPM", "1", 'did you mean "gemini"?'),
        ("GWPROXY__PROVIDERS__GEMINI__RPM", "ten", 'must be a whole number, not "ten"; write a nu'),
        ("GWPROXY__PROVIDERS__GEMINI__RPM", "1_0", "must be a whole number"),
        ("GWPROXY__PROVIDERS__GEMINI__RPM", "٣", "must be a whole number"),
        ("GWPROXY__PROVIDERS__GEMINI__RPM", "9" * 5000, "must be a whole number"),
        ("GWPROXY__SERVER__DRAIN_S", "1e3", 'must be a number, not "1e3"'),
        (
            "GWPROXY__SERVER__LISTEN",
            "",
            'server.listen: "" is not an'.removeprefix("server.listen: "),
        ),
        ("GWPROXY__METRICS__OPEN", "yes", 'must be true or false, not "yes"'),
        ("GWPROXY__MODELS__M__CHAIN", "[", "is not a list as TOML writes it"),
        ("GWPROXY__MODELS__M__CHAIN", "[]\nx = 1", "is not a list as TOML writes it"),
        ("CIRCUIT_BREAKER_OPEN_TIMEOUT", "60s", 'must be a whole number, not "60s"'),
    ],
)
def test_a_wrong_variable_is_told_by_its_name(
    file: Path, variable: str, value: str, said: str
) -> None:
    lines = refusal(file, f"{LOCAL}[providers.gemini]\nrpm = 1\n", {variable: value})
    assert lines[0].startswith(f"environment: {variable}: ") and said in lines[0], lines
    assert len(lines[0]) < 400


def test_a_variable_one_underscore_short_is_warned_of(file: Path) -> None:
    environ = {"GWPROXY_SERVER_LISTEN": "x", "GWPROXY_ADMIN_KEY": "k" * 32, "GWPROXY_CONFIG": "x"}
    assert loaded(file, LOCAL, environ).warnings == (
        "GWPROXY_SERVER_LISTEN is not read: did you mean GWPROXY__SERVER__LISTEN?",
    )


def test_an_empty_variable_takes_an_optional_key_away(file: Path) -> None:
    text = f"{LOCAL}rpm_ceiling = 5\n[providers.a]\nrpm = 1\n"
    environ = {"GWPROXY__UPSTREAM__RPM_CEILING": "", "GWPROXY__PROVIDERS__A__RPM": ""}
    config = loaded(file, text, environ)
    assert (config.upstream.rpm_ceiling, config.providers["a"].rpm) == (None, None)


def test_the_breakers_variables_win_over_the_file_and_the_full_names_over_them(file: Path) -> None:
    text = f"{LOCAL}[breaker]\nfailure_threshold = 7\nsuccess_threshold = 7\nopen_timeout_ms = 7\n"
    environ = {
        "CIRCUIT_BREAKER_FAILURE_THRESHOLD": "4",
        "CIRCUIT_BREAKER_SUCCESS_THRESHOLD": "5",
        "CIRCUIT_BREAKER_OPEN_TIMEOUT": "1500",
    }
    breaker = loaded(file, text, environ).breaker
    assert dataclasses.astuple(breaker) == (4, 5, 1500)
    breaker = loaded(file, text, environ | {"GWPROXY__BREAKER__OPEN_TIMEOUT_MS": "9"}).breaker
    assert dataclasses.astuple(breaker) == (4, 5, 9)
    assert dataclasses.astuple(
        loaded(file, text, {"CIRCUIT_BREAKER_OPEN_TIMEOUT": ""}).breaker
    ) == (
        7,
        7,
        7,
    )


# -- chains --------------------------------------------------------------------------------------

THREE = f"""{LOCAL}
[providers.gemini]
prefix = "google-ai-studio"
model = "gemini-2.5-flash"
[providers.openai]
model = "gpt-4o-mini"
[providers.silent]
"""


def chain_of(config: Config, name: str = "auto") -> list[tuple[str, str, int]]:
    return [(one.provider, one.model, one.weight) for one in config.models[name].chain]


def test_a_chain_names_providers_with_their_model_or_another(file: Path) -> None:
    chain = (
        '["gemini", { provider = "gemini", model = "pro", weight = 80 }, { provider = "openai" }]'
    )
    config = loaded(file, f'{THREE}[models."gpt-4o"]\nchain = {chain}\n')
    assert config.models["gpt-4o"].chain == (
        ChainEntry("gemini", "gemini-2.5-flash", 0),
        ChainEntry("gemini", "pro", 80),
        ChainEntry("openai", "gpt-4o-mini", 0),
    )


@pytest.mark.parametrize(
    ("chain", "said"),
    [
        ('["gemni"]', 'there is no provider "gemni"; did you mean "gemini"?'),
        ('["silent"]', 'provider "silent" has no model to serve here; write { provider = "silent"'),
        ('["openai", "openai"]', 'names openai with "gpt-4o-mini" twice; remove one'),
    ],
)
def test_a_chain_that_leads_nowhere_is_refused(file: Path, chain: str, said: str) -> None:
    (line,) = refusal(file, f"{THREE}[models.m]\nchain = {chain}\n")
    assert line.startswith("config.toml: models.m.chain: ") and said in line


@pytest.mark.parametrize(
    ("chains", "said"),
    [
        ({"a": ["a"]}, "models.a.chain: leads in a circle: a -> a; list the providers themselves"),
        ({"a": ["gemini", "b"], "b": ["c"], "c": ["a"]}, "leads in a circle: a -> b -> c -> a; "),
        ({"a": ["b"], "b": ["c"], "c": ["b"]}, 'a.chain: names the chain "b", which is no provid'),
        ({"a": ["b"], "b": ["gemini"]}, 'names the chain "b", which is no provider; list the prov'),
        ({"a": []}, "a.chain: must be a list with at least one provider; write chain = "),
    ],
)
def test_a_chain_of_chains_is_refused_and_so_is_an_empty_one(
    file: Path, chains: dict[str, list[str]], said: str
) -> None:
    text = "".join(f"[models.{name}]\nchain = {chain}\n" for name, chain in chains.items())
    assert said in refusal(file, f"{THREE}{text}")[0]


def test_each_bad_entry_of_a_chain_is_told(file: Path) -> None:
    chain = '["gemni", "gemini", 1, "nope", { provider = "openai", weight = -1 }, { model = "x" }]'
    lines = refusal(file, f"{THREE}[models.m]\nchain = {chain}\n")
    said = ('"gemni"', "entry 3 is", '"nope"', "entry 5: weight", "entry 6 needs")
    assert len(lines) == len(said)
    assert all(words in line for words, line in zip(said, lines, strict=True))


def test_a_negative_weight_is_refused(file: Path) -> None:
    text = f'{THREE}[models.m]\nchain = [{{ provider = "gemini", weight = -1 }}]\n'
    (line,) = refusal(file, text)
    assert "entry 1: weight -1 is out of range; write a number from 0 to 1000000" in line


def test_a_chain_knows_prefixes_aliases_and_the_catalogue(file: Path) -> None:
    chain = '["google", "google-ai-studio", { provider = "xai", model = "grok-4" }]'
    text = f"{THREE}[models.m]\nchain = {chain}\n"
    with pytest.raises(ConfigError, match=r'names gemini with "gemini-2.5-flash" twice'):
        loaded(file, text, catalogue=CATALOGUE)
    config = loaded(file, text.replace('"google", ', ""), catalogue=CATALOGUE)
    assert chain_of(config, "m") == [("gemini", "gemini-2.5-flash", 0), ("grok", "grok-4", 0)]
    # A table that is called by an alias needs no prefix to be found by another one.
    plain = f'{LOCAL}[providers.gemini]\nmodel = "f"\n[models.m]\nchain = ["google"]\n'
    assert chain_of(loaded(file, plain, catalogue=CATALOGUE), "m") == [("gemini", "f", 0)]


def test_a_chain_in_a_variable_is_a_list_of_names_or_toml(file: Path) -> None:
    config = loaded(file, THREE, {"GWPROXY__MODELS__FAST__CHAIN": "openai, gemini"})
    assert [entry.provider for entry in config.models["fast"].chain] == ["openai", "gemini"]
    written = '["gemini", {provider = "openai", weight = 3}]'
    config = loaded(file, THREE, {"GWPROXY__MODELS__FAST__CHAIN": written})
    assert chain_of(config, "fast") == [
        ("gemini", "gemini-2.5-flash", 0),
        ("openai", "gpt-4o-mini", 3),
    ]


@pytest.mark.parametrize(
    ("environ", "chain", "warnings"),
    [
        (
            {"AI_PROVIDER": "OpenAI", "AI_MODEL": "gpt-4o"},
            [("openai", "gpt-4o", 0), ("gemini", "gemini-2.5-flash", 0)],
            [],
        ),
        (
            {"AI_PROVIDER": "gemini", "AI_FALLBACK_PROVIDERS": "openai,gemini, silent"},
            [("gemini", "gemini-2.5-flash", 0), ("openai", "gpt-4o-mini", 0)],
            ['"silent"'],
        ),
        (
            {},
            [("gemini", "gemini-2.5-flash", 0)],
            [],
        ),
        ({"AI_MODEL": "x", "AI_FALLBACK_PROVIDERS": "gemini"}, None, ["AI_MODEL changes nothing"]),
    ],
)
def test_auto_without_a_table_follows_the_ai_variables(
    file: Path,
    environ: dict[str, str],
    chain: list[tuple[str, str, int]] | None,
    warnings: list[str],
) -> None:
    config = loaded(file, THREE, environ)
    assert chain_of(config) == (chain or [("gemini", "gemini-2.5-flash", 0)])
    assert len(config.warnings) == len(warnings)
    for warning, part in zip(config.warnings, warnings, strict=True):
        assert part in warning


def test_who_uses_no_fallbacks_hears_nothing_of_them(file: Path) -> None:
    config = loaded(file, LOCAL)
    assert (dict(config.models), config.warnings) == ({}, ())


def test_an_unknown_ai_provider_is_an_error(file: Path) -> None:
    (line,) = refusal(file, THREE, {"AI_PROVIDER": "gemni"})
    assert line == 'environment: AI_PROVIDER: there is no provider "gemni"; did you mean "gemini"?'


def test_a_table_for_auto_wins_over_the_ai_variables_and_says_so(file: Path) -> None:
    text = f'{THREE}[models.auto]\nchain = ["openai"]\n'
    config = loaded(file, text, {"AI_PROVIDER": "gemini"})
    assert chain_of(config) == [("openai", "gpt-4o-mini", 0)]
    assert config.warnings == (
        "AI_PROVIDER changes nothing: [models.auto] in the configuration decides",
    )


# -- anything at all -----------------------------------------------------------------------------

values = st.recursive(
    st.one_of(
        st.booleans(),
        st.integers(),
        st.text(),
        st.decimals(),
        st.dates(),
        st.times(),
        st.datetimes(),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
known = st.sampled_from([(table, key) for table in TABLES for key in keys_of(table)])


@given(place=known, value=values)
def test_a_key_is_accepted_or_refused_in_words_whatever_it_holds(
    place: tuple[str, str], value: Any
) -> None:
    """Straight into the tree, past TOML's grammar: no exception but ConfigError, one line each."""
    table, key = place
    tree: dict[str, Any] = {}
    node = tree
    for step in table.split("."):
        node = node.setdefault("x" if step == "*" else step, {})
    node[key] = value
    try:
        Reader(None, tree, CLOUDFLARE, {}).config()
    except ConfigError as error:
        assert all(problem.what and problem.cure for problem in error.problems)
        assert len(str(error).split("\n")) == len(error.problems)


@given(st.dictionaries(st.text(st.characters(codec="utf-8")), values, max_size=4))
def test_unknown_tables_are_refused_in_words_whatever_they_hold(tree: dict[str, Any]) -> None:
    try:
        Reader(None, tree, CLOUDFLARE, {}).config()
    except ConfigError as error:
        assert len(str(error).split("\n")) == len(error.problems)
    else:
        assert tree.keys() <= {table.split(".")[0] for table in TABLES}


# -- check-config --------------------------------------------------------------------------------


def run_check(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    check.add_commands(parser.add_subparsers(required=True))
    args = parser.parse_args(["check-config", *arguments])
    code = args.func(args)
    assert isinstance(code, int)
    return code


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in list(os.environ):
        if name.startswith(("GWPROXY", "CLOUDFLARE_", "AI_", "CIRCUIT_BREAKER_", "STATE_DIR")):
            monkeypatch.delenv(name)
    return monkeypatch


def test_check_config_says_what_the_file_means_and_no_secret(
    clean_environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in CLOUDFLARE.items():
        clean_environment.setenv(name, value)
    clean_environment.setenv("GWPROXY_ADMIN_KEY", "k" * 40)
    clean_environment.setenv("GWPROXY_SERVER_LISTEN", "x")
    assert run_check("--config", str(SHIPPED)) == 0
    text = capsys.readouterr().out
    for part in (
        "127.0.0.1:8080",
        "https://gateway.ai.cloudflare.com/v1/acc0123/github-ai-agent/compat/chat/completions",
        "prefix google-ai-studio, model gemini-2.5-flash, 100 requests a minute, $10.00 a day",
        "gemini/gemini-2.5-flash -> openai/gpt-4o-mini -> anthropic/claude-sonnet-4-5",
        str(SHIPPED.parent / "gwproxy.db"),
        "warning: GWPROXY_SERVER_LISTEN is not read",
        "The configuration is fine.",
    ):
        assert part in text
    assert TOKEN not in text and "kkkk" not in text

    assert run_check("--config", str(SHIPPED), "--json") == 0
    text = capsys.readouterr().out
    assert TOKEN not in text and "kkkk" not in text
    told = json.loads(text)
    assert told["ok"] is True
    assert told["providers"]["gemini"]["daily_usd"] == "10.000000000"
    assert told["models"]["auto"][0] == {
        "provider": "gemini",
        "model": "gemini-2.5-flash",
        "weight": 0,
    }
    assert told["warnings"]


def test_check_config_exits_with_2_and_tells_every_problem(
    clean_environment: pytest.MonkeyPatch, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(f'{LOCAL}[server]\nlisen = "x"\n[log]\nlevel = 1\n')
    assert run_check("--config", str(file)) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 2
    assert run_check("--config", str(file), "--json") == 2
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is False
    assert told["problems"][0] == {
        "file": str(file),
        "key": "server.lisen",
        "problem": "is not a key of this table",
        "cure": 'did you mean "listen"?',
    }


def test_check_config_warns_of_every_candidate_without_a_price(
    clean_environment: pytest.MonkeyPatch, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    priced = '{ provider = "own", model = "x" }, { provider = "openai", model = "gpt-4o" }'
    chain = f'[models.auto]\nchain = ["own", {priced}]\n'
    own = '[providers.own]\nmodel = "y"\n[providers.openai]\n'
    price = '[prices.models."own/x"]\ninput = "1"\noutput = "1"\n'
    file.write_text(f"{LOCAL}{own}{chain}{price}")
    assert run_check("--config", str(file)) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "no price" in line]
    assert told == [
        'warning: own/y has no price and is passed over in models.auto: add [prices.models."own/y"]'
    ]
    assert run_check("--config", str(file), "--json") == 0
    warnings = json.loads(capsys.readouterr().out)["warnings"]
    assert [f"warning: {warning}" for warning in warnings] == told


def test_check_config_shows_providers_with_servers_of_their_own(
    clean_environment: pytest.MonkeyPatch, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = '[providers.own]\nbase_url = "http://127.0.0.1:1/v1"\ndaily_usd = "0.005"\n'
    price = '[prices.models."own/x"]\ninput = "0.10"\noutput = 2\n'
    file.write_text(f"{LOCAL}{own}{price}[storage]\nbackup_every_h = 0\n")
    assert run_check("--config", str(file)) == 0
    text = capsys.readouterr().out
    assert "no model of its own, $0.005 a day, at http://127.0.0.1:1/v1/chat/completions" in text
    assert "(openai), without a token" in text
    assert "0.10 in, 2 out, USD per million tokens" in text
    assert "GWPROXY_ADMIN_KEY is not set" in text
