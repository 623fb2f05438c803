"""The floors of the house: who may import whom, and which library has which one home."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

HOUSE = Path(__file__).parent.parent / "gwproxy"

FLOORS = {
    **{"core": 1, "metrics": 1, "log": 1, "notify": 1},
    **{"storage": 2, "config": 2, "assets": 2, "intake": 2, "state": 3},
    **{"proxy": 4, "admin": 4, "cloudflare": 4, "web": 5, "listener": 5},
    **{"webhook": 4, "parts": 5},
    **{"app": 6, "cli": 7, "__main__": 8},
}
HOMES = {
    **{"aiosqlite": "storage", "sqlite3": "storage"},
    **{"aiohappyeyeballs": "proxy.upstream", "httptools": "proxy.upstream"},
    "tomllib": "config",
}
# What the pure room may use: values, text and numbers. Nothing here reads a clock or a file.
CORE_USES = {
    *("ast", "base64", "binascii", "bisect", "collections", "dataclasses", "datetime", "decimal"),
    *("enum", "fractions", "functools", "hashlib", "hmac", "itertools", "json", "math", "operator"),
    *("re", "struct", "types", "typing", "unicodedata", "zlib", "msgspec", "orjson", "tiktoken"),
}
CLOCKS = {"datetime.now", "datetime.utcnow", "datetime.today", "date.today"}
TASKS = {"create_task", "ensure_future"}


def violations(module: str, source: str) -> Iterator[str]:
    """What the file of `module` (such as "proxy.relay") must not do."""
    room, _, _ = module.partition(".")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _import(room, module, alias.name)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                if node.level > 1 or not (HOUSE / room).is_dir():
                    yield "a relative import leaves its room"
            elif node.module == "gwproxy":
                for alias in node.names:
                    if not alias.name.startswith("__"):
                        yield from _import(room, module, f"gwproxy.{alias.name}")
            else:
                yield from _import(room, module, node.module or "")
                if node.module == "asyncio" and not TASKS.isdisjoint(a.name for a in node.names):
                    yield "a task without an owner"
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield "a type lives on the wrong floor"
        elif isinstance(node, ast.Attribute):
            whole = ast.unparse(node)
            if node.attr in TASKS and "group" not in whole:
                yield f"a task without an owner: {whole}"
            if room == "core" and whole in CLOCKS:
                yield f"core reads a clock: {whole}"
        elif isinstance(node, ast.Call) and room == "core" and ast.unparse(node.func) == "open":
            yield "core opens a file"


def _import(room: str, module: str, name: str) -> Iterator[str]:
    top, _, rest = name.partition(".")
    if top != "gwproxy":
        home = HOMES.get(top)
        if home is not None and room != "demo" and home not in (room, module):
            yield f"{top} is at home in {home}"
        if room == "core" and top not in CORE_USES:
            yield f"core uses {top}"
        return
    other = rest.partition(".")[0]
    if not other or other == room:
        return
    if room == "demo":
        yield f"demo stands apart and imports {other}"
    elif other == "demo":
        if room != "cli":
            yield "only the command line may import demo"
    elif other not in FLOORS:
        yield f"{other} stands on no floor"
    elif FLOORS.get(room, 0) <= FLOORS[other]:
        yield f"{room} (floor {FLOORS.get(room, 0)}) imports {other} (floor {FLOORS[other]})"


MODULES = {
    ".".join(path.relative_to(HOUSE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(HOUSE.rglob("*.py"))
}


@pytest.mark.parametrize("module", MODULES)
def test_every_room_imports_only_from_the_floors_below(module: str) -> None:
    room = module.partition(".")[0]
    assert room in {*FLOORS, "demo", "__init__"}, "a room without a floor"
    assert list(violations(module, MODULES[module].read_text())) == []


@pytest.mark.parametrize(
    ("module", "source", "words"),
    [
        ("core.money", "import time", "core uses time"),
        ("core.money", "from os import path", "core uses os"),
        ("core.money", "import logging.handlers", "core uses logging"),
        ("core.money", "def f():\n    import random", "core uses random"),
        ("core.money", "from datetime import datetime\ndatetime.now()", "core reads a clock"),
        ("core.money", "open('x')", "core opens a file"),
        ("core.money", "from gwproxy.log import Log", "core (floor 1) imports log"),
        ("core.money", "from gwproxy import config", "core (floor 1) imports config"),
        ("proxy.relay", "from gwproxy.admin import body", "proxy (floor 4) imports admin"),
        ("proxy.relay", "import gwproxy.web", "proxy (floor 4) imports web"),
        ("config", "from gwproxy.storage import database", "config (floor 2) imports storage"),
        ("state.books", "import sqlite3", "sqlite3 is at home"),
        ("proxy.relay", "import httptools", "httptools is at home"),
        ("cli.check", "import tomllib", "tomllib is at home"),
        ("demo.server", "from gwproxy.core import money", "demo stands apart"),
        ("app", "from gwproxy.demo import main", "only the command line"),
        ("app", "from . import web", "leaves its room"),
        ("proxy.relay", "from ..web import Front", "leaves its room"),
        ("app", "from typing import TYPE_CHECKING\nif TYPE_CHECKING: pass", "wrong floor"),
        ("app", "import asyncio\nasyncio.create_task(f())", "without an owner"),
        ("app", "loop.create_task(f())", "without an owner"),
        ("app", "from asyncio import ensure_future", "without an owner"),
    ],
)
def test_a_planted_violation_is_seen(module: str, source: str, words: str) -> None:
    assert any(words in found for found in violations(module, source))


def test_what_the_house_allows_is_not_complained_of() -> None:
    lawful = "from gwproxy import __version__\nfrom gwproxy.core.money import Nanos\n"
    assert list(violations("state.books", lawful)) == []
    assert list(violations("core.pricing", "from gwproxy.core.money import Nanos")) == []
    assert list(violations("cli.demo", "from gwproxy.demo import main")) == []
    assert list(violations("storage.database", "import sqlite3, aiosqlite")) == []
    assert list(violations("app", "group.create_task(f())")) == []
