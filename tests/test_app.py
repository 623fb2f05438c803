"""The whole application: its routes, its listeners, how it starts and how it ends."""

import asyncio
import io
import os
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from gwproxy import assets
from gwproxy.app import App
from gwproxy.config import Config, load
from gwproxy.core.pricing import PriceBook
from gwproxy.core.routing import CATALOGUE, Provider
from gwproxy.core.tokens import ByteEstimate
from gwproxy.log import Log
from gwproxy.parts import PASSTHROUGH, build_routes
from gwproxy.storage.database import DatabaseInUse
from tests.harness import (
    ADMIN,
    ADMIN_KEY,
    CONFIG,
    DONE,
    UPSTREAM_TOKEN,
    Received,
    Upstream,
    Wire,
    bearer,
    chat,
    events,
    make_key,
    tokenizer,
)
from tests.raw import connect, get, post, prompt

ENVIRON = {"GWPROXY_ADMIN_KEY": ADMIN_KEY, "UPSTREAM_TOKEN": UPSTREAM_TOKEN}


def configuration(folder: Path, text: str, environ: dict[str, str] = ENVIRON) -> Config:
    path = folder / "config.toml"
    path.write_text(text)
    path.chmod(0o600)
    return load(path, environ, catalogue=CATALOGUE)


def text_for(
    upstream: str = "http://127.0.0.1:9/v1",
    *,
    listen: str = "127.0.0.1:0",
    admin: str = "",
    more: str = "",
) -> str:
    text = CONFIG.format(upstream=upstream, more=more)
    text = text.replace('listen = "127.0.0.1:0"', f'listen = "{listen}"')
    return text.replace("[admin]", f'[admin]\nlisten = "{admin}"') if admin else text


@asynccontextmanager
async def running(config: Config) -> AsyncIterator[App]:
    log = Log(io.StringIO())
    log.start()
    app = await App.start(config, log, tokenizer())
    try:
        yield app
    finally:
        await app.stop()
        log.stop()


@asynccontextmanager
async def client(address: str) -> AsyncIterator[aiohttp.ClientSession]:
    """A client of one listener, over TCP or a Unix socket."""
    if address.startswith("unix:"):
        connector: aiohttp.BaseConnector = aiohttp.UnixConnector(address.removeprefix("unix:"))
        address = "http://gateway"
    else:
        connector = aiohttp.TCPConnector()
    async with aiohttp.ClientSession(address, connector=connector) as session:
        yield session


async def status(session: aiohttp.ClientSession, path: str, **headers: str) -> int:
    async with session.get(path, headers=headers) as answer:
        await answer.read()
        return answer.status


async def is_open(address: str) -> bool:
    host, _, port = address.removeprefix("http://").rpartition(":")
    try:
        _, writer = await asyncio.open_connection(host, int(port))
    except OSError:
        return False
    writer.close()
    return True


# -- routes from the configuration -----------------------------------------------------------------

PROVIDERS = """
[providers.gemini]
model = "gemini-2.5-flash"
[providers.openai]
[providers.anthropic]
max_tokens_field = "max_completion_tokens"
[providers.hf]
prefix = "custom-hf"
[providers.vertex]
prefix = "google-vertex-ai/google"
[providers.groq]
flavour = "openai"
base_url = "http://127.0.0.1:9/v1"
[providers.ollama]
flavour = "openai"
base_url = "http://127.0.0.1:9/v1"
[providers.router]
flavour = "openai"
base_url = "http://127.0.0.1:9/v1"
prefix = "anthropic"
[models.auto]
chain = ["gemini", { provider = "openai", model = "gpt-4o", weight = 3 }]
[models."openai/gpt-4o"]
chain = [{ provider = "gemini", model = "gemini-2.5-pro" }]
"""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gemini", ("google-ai-studio", "google-ai-studio", "gemini-2.5-flash", "max_tokens")),
        ("openai", ("openai", "openai", None, "max_completion_tokens")),
        ("anthropic", ("anthropic", "anthropic", None, "max_completion_tokens")),
        ("hf", ("custom-hf", "custom-hf", None, "max_tokens")),
        ("vertex", ("google-vertex-ai/google", "google-vertex-ai", None, "max_tokens")),
        ("groq", ("", "groq", None, "max_tokens", "openai")),
        ("ollama", ("", "ollama", None, "max_tokens", "openai")),
        ("router", ("anthropic", "anthropic", None, "max_tokens", "openai")),
    ],
)
def test_a_provider_becomes_what_resolution_reads(
    tmp_path: Path, name: str, expected: tuple[Any, ...]
) -> None:
    text = text_for(more=PROVIDERS).replace(
        '"openai"\nbase_url', '"cloudflare-compat"\nbase_url', 1
    )
    routes = build_routes(configuration(tmp_path, text), PriceBook(assets.prices()))
    field, flavour = (*expected[3:], "cloudflare-compat")[:2]
    assert routes.providers[name] == Provider(
        name, *expected[:3], max_tokens_field=field, flavour=flavour
    )
    assert routes.passthrough is None
    assert routes.serves_catalogue
    assert "gemini-2.5-pro" in routes.catalogue["google-ai-studio"]
    chain = routes.resolve("auto") or ()
    assert [(each.sent, each.weight) for each in chain] == [
        ("google-ai-studio/gemini-2.5-flash", 0),
        ("openai/gpt-4o", 3),
    ]
    (only,) = routes.resolve("openai/gpt-4o") or ()
    assert only.sent == "google-ai-studio/gemini-2.5-pro"


def test_an_openai_compatible_upstream_takes_names_as_they_come(tmp_path: Path) -> None:
    routes = build_routes(configuration(tmp_path, text_for()), PriceBook(assets.prices()))
    assert routes.passthrough == Provider(PASSTHROUGH, "", "openai", flavour="openai")
    assert not routes.serves_catalogue
    (candidate,) = routes.resolve("any/name/at all") or ()
    assert candidate.sent == "any/name/at all"


# -- listeners -------------------------------------------------------------------------------------

ADMIN_PATHS = ("/admin/users", "/admin/organizations", "/metrics")


async def test_a_listener_of_its_own_keeps_administration_off_the_public_one(
    tmp_path: Path, upstream: Upstream
) -> None:
    config = configuration(tmp_path, text_for(upstream.url, admin="127.0.0.1:0"))
    async with running(config) as app:
        public, private = app.addresses
        async with client(public) as outside, client(private) as inside:
            for path in ADMIN_PATHS:
                assert await status(outside, path, **ADMIN) == 404
                assert await status(outside, path) == 404
            async with outside.post("/admin/users", json={}, headers=ADMIN) as answer:
                assert answer.status == 404
            assert await status(inside, "/admin/users", **ADMIN) == 200
            assert await status(inside, "/admin/users") == 401
            assert await status(inside, "/metrics") == 200
            assert await status(inside, "/v1/models") == 404
            for session in (outside, inside):
                for path in ("/health", "/health/live", "/health/ready"):
                    assert await status(session, path) == 200
            key = await make_key(inside)
            async with outside.post(
                "/v1/chat/completions", json=chat(), headers=bearer(key)
            ) as answer:
                assert answer.status == 200
            async with inside.post(
                "/v1/chat/completions", json=chat(), headers=bearer(key)
            ) as answer:
                assert answer.status == 404


async def test_on_one_listener_for_both_metrics_ask_for_an_admin_key(tmp_path: Path) -> None:
    async with running(configuration(tmp_path, text_for())) as app:
        (address,) = app.addresses
        async with client(address) as session:
            assert await status(session, "/metrics") == 401
            assert await status(session, "/metrics", **ADMIN) == 200


@pytest.mark.parametrize("alias", [False, True])
async def test_the_short_path_is_there_only_if_it_is_configured(
    tmp_path: Path, upstream: Upstream, alias: bool
) -> None:
    text = text_for(upstream.url).replace(
        "[server]", f"[server]\nchat_alias = {str(alias).lower()}"
    )
    async with running(configuration(tmp_path, text)) as app, client(app.addresses[0]) as session:
        key = await make_key(session)
        async with session.post("/chat", json=chat(), headers=bearer(key)) as answer:
            assert answer.status == (200 if alias else 404)


async def test_a_unix_socket_is_listened_on(tmp_path: Path, upstream: Upstream) -> None:
    path = tmp_path / "gw.sock"
    config = configuration(tmp_path, text_for(upstream.url, listen=f"unix:{path}"))
    async with running(config) as app:
        assert app.addresses == [f"unix:{path}"]
        async with client(app.addresses[0]) as session:
            key = await make_key(session)
            for body in (chat(), chat(stream=True)):
                async with session.post(
                    "/v1/chat/completions", json=body, headers=bearer(key)
                ) as answer:
                    assert answer.status == 200
                    assert b"lo." in await answer.read()
            for _ in range(3):  # a wrong admin key from an address that has no name
                assert await status(session, "/admin/users", **bearer("wrong" * 10)) == 401


async def test_a_socket_that_a_killed_process_left_behind_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "gw.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    assert stat.S_ISSOCK(path.stat().st_mode)
    config = configuration(tmp_path, text_for(listen=f"unix:{path}"))
    async with running(config) as app, client(app.addresses[0]) as session:
        assert await status(session, "/health") == 200


async def test_a_file_that_is_no_socket_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("do not lose me")
    with pytest.raises(OSError):
        async with running(configuration(tmp_path, text_for(listen=f"unix:{path}"))):
            pass
    assert path.read_text() == "do not lose me"


async def test_an_inherited_socket_is_listened_on_and_what_waits_in_it_is_served(
    tmp_path: Path,
) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        host, port = listening.getsockname()
        # A client that came before the gateway: the kernel has kept it.
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        inherited = os.dup(listening.fileno())
        config = configuration(tmp_path, text_for(listen=f"fd:{inherited}"))
        async with running(config) as app:
            assert app.addresses == [f"http://{host}:{port}"]
            async with asyncio.timeout(5):
                assert (await reader.read()).startswith(b"HTTP/1.1 200 OK\r\n")
            async with client(app.addresses[0]) as session:
                assert await status(session, "/health") == 200
        writer.close()


async def test_who_connects_to_an_inherited_socket_while_it_drains_waits_for_the_next_process(
    tmp_path: Path, upstream: Upstream
) -> None:
    slow = asyncio.Event()

    async def script(wire: Wire, received: Received) -> None:
        await wire.start()
        hello, *rest = events("Hel", "lo.")
        await wire.chunk(hello)
        await slow.wait()
        for data in rest:
            await wire.chunk(data)
        await wire.end()

    upstream.script = script
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1]

        def inherited() -> Config:
            number = os.dup(listening.fileno())
            return configuration(tmp_path, text_for(upstream.url, listen=f"fd:{number}"))

        async with (
            connect(port) as streaming,
            connect(port) as idle,
            connect(port) as new,
            running(inherited()) as app,
            client(app.addresses[0]) as session,
        ):
            key = await make_key(session)
            streaming.send(post(prompt(stream=True), key=key))
            assert (await streaming.head())[0] == 200
            idle.send(get("/health"))
            assert (await idle.answer()).status == 200
            async with asyncio.TaskGroup() as group:
                stopping = group.create_task(app.stop())
                # Whoever is idle is let go; whoever had connected is answered, once; whoever comes
                # now waits, while the stream goes on to its end.
                assert await idle.rest() == b""
                async with connect(port) as late:
                    late.send(get("/health"))
                    new.send(get("/v1/models", key=key))
                    answer = await new.answer()
                    assert (answer.status, answer.code) == (503, "draining")
                    assert await new.rest() == b""
                    slow.set()
                    body = b"".join([part async for part in streaming.chunks()])
                    assert body.endswith(DONE)
                    async with asyncio.timeout(5):
                        await stopping
                    async with running(inherited()):
                        assert (await late.answer()).status == 200


async def test_a_descriptor_that_is_no_socket_is_a_start_that_fails(tmp_path: Path) -> None:
    with (tmp_path / "plain").open("w") as plain:
        config = configuration(tmp_path, text_for(listen=f"fd:{plain.fileno()}"))
        with pytest.raises(OSError, match=r"cannot listen on fd:\d+: .*start gwproxy.socket"):
            async with running(config):
                pass


async def test_ipv6_is_written_with_its_brackets(tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("this machine has no IPv6")
    async with running(configuration(tmp_path, text_for(listen="[::1]:0"))) as app:
        assert app.addresses[0].startswith("http://[::1]:")
        async with client(app.addresses[0]) as session:
            assert await status(session, "/health") == 200


# -- start and end ---------------------------------------------------------------------------------


async def test_a_second_instance_on_the_same_database_is_refused(tmp_path: Path) -> None:
    config = configuration(tmp_path, text_for())
    async with running(config) as first:
        with pytest.raises(DatabaseInUse):
            await App.start(config, Log(io.StringIO()), tokenizer())
        async with client(first.addresses[0]) as session:
            assert await status(session, "/health/ready") == 200
            assert await status(session, "/admin/users", **ADMIN) == 200
    async with running(config) as again, client(again.addresses[0]) as session:
        assert await status(session, "/health/ready") == 200


async def test_a_start_that_fails_gives_the_database_back(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        config = configuration(tmp_path, text_for(listen=f"127.0.0.1:{taken.getsockname()[1]}"))
        with pytest.raises(OSError):
            await App.start(config, Log(io.StringIO()), tokenizer())
    async with running(config) as app, client(app.addresses[0]) as session:
        assert await status(session, "/health/ready") == 200


async def test_after_its_end_nothing_listens_and_the_database_is_free(tmp_path: Path) -> None:
    path = tmp_path / "gw.sock"
    config = configuration(tmp_path, text_for(admin=f"unix:{path}"))
    async with running(config) as app:
        address = app.addresses[0]
        assert await is_open(address)
    assert not await is_open(address)
    with pytest.raises(OSError):
        await asyncio.open_unix_connection(str(path))
    async with running(config):
        pass


async def test_what_was_stored_is_there_after_a_restart(tmp_path: Path, upstream: Upstream) -> None:
    config = configuration(tmp_path, text_for(upstream.url))
    async with running(config) as app, client(app.addresses[0]) as session:
        key = await make_key(session)
    async with running(config) as app, client(app.addresses[0]) as session:
        assert await status(session, "/v1/models", **bearer(key)) == 200


async def test_without_a_bootstrap_key_nobody_administers_and_the_log_says_so(
    tmp_path: Path,
) -> None:
    environ = {"UPSTREAM_TOKEN": UPSTREAM_TOKEN}
    config = configuration(tmp_path, text_for(), environ)
    written = io.StringIO()
    log = Log(written)
    log.start()
    app = await App.start(config, log, tokenizer())
    try:
        async with client(app.addresses[0]) as session:
            for headers in ({}, ADMIN, bearer("")):
                assert await status(session, "/admin/users", **headers) == 401
    finally:
        await app.stop()
        log.stop()
    assert written.getvalue().count("bootstrap key is off") == 1


async def test_a_gateway_that_cannot_count_exactly_serves_and_says_so(
    tmp_path: Path, upstream: Upstream
) -> None:
    written = io.StringIO()
    log = Log(written)
    log.start()
    config = configuration(tmp_path, text_for(upstream.url, more="[metrics]\nopen = true"))
    app = await App.start(config, log, ByteEstimate("it miscounts"))
    try:
        async with client(app.addresses[0]) as session:
            key = await make_key(session)
            async with session.post(
                "/v1/chat/completions", json=chat(stream=True), headers=bearer(key)
            ) as answer:
                assert answer.status == 200
                await answer.read()
            async with session.get("/metrics") as answer:
                assert "gwproxy_tokenizer_fallback 1.0" in await answer.text()
    finally:
        await app.stop()
        log.stop()
    assert written.getvalue().count("it miscounts") == 1
