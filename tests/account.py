"""What the tests of the operator's side share: a configuration for the demo gateway, and a shell in
which the commands run as a person would run them, while the demo answers in the test's own loop.
"""

import asyncio
import io
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pytest

from gwproxy.cli import main
from gwproxy.demo import DemoUpstream

TOKEN = "demo-token-that-nobody-may-see"

CONFIG = """
[server]
listen = "{listen}"
[admin]
key = "env:GWPROXY_ADMIN_KEY"
[upstream]
base_url = "{compat}"
account_id = "demo"
gateway_id = "demo"
token = "env:CLOUDFLARE_API_TOKEN"
api_url = "{api}"
[providers.gemini]
prefix = "google-ai-studio"
model = "gemini-2.5-flash"
[providers.openai]
model = "gpt-4o-mini"
[providers.anthropic]
model = "claude-sonnet-4-5"
[models.auto]
chain = ["gemini", "openai", "anthropic"]
[storage]
journal_segment_bytes = 1048576
{more}
"""


def config_text(demo: DemoUpstream, more: str = "", listen: str = "127.0.0.1:0") -> str:
    return CONFIG.format(compat=demo.compat_url, api=demo.api_url, more=more, listen=listen)


@dataclass
class Shell:
    """`code`, `out` and `err` are those of the last command."""

    folder: Path
    monkeypatch: pytest.MonkeyPatch
    code: int = -1
    out: str = ""
    err: str = ""

    async def __call__(self, *words: str, stdin: str = "") -> int:
        out, err = io.StringIO(), io.StringIO()
        self.monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        with redirect_stdout(out), redirect_stderr(err):
            self.code = await asyncio.to_thread(_main, words)
        self.out, self.err = out.getvalue(), err.getvalue()
        return self.code

    @property
    def json(self) -> Any:
        return orjson.loads(self.out)

    def files(self) -> bytes:
        """All that is on the disk."""
        return b"".join(path.read_bytes() for path in self.folder.rglob("*") if path.is_file())


def _main(words: tuple[str, ...]) -> int:
    try:
        return main(words)
    except SystemExit as end:
        return int(end.code or 0)


def shell(
    folder: Path, monkeypatch: pytest.MonkeyPatch, demo: DemoUpstream, more: str = ""
) -> Shell:
    path = folder / "config.toml"
    path.write_text(config_text(demo, more))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("GWPROXY_CONFIG", str(path))
    monkeypatch.setenv("CLOUDFLARE_API_TOKEN", TOKEN)
    for name in ("CLOUDFLARE_OPERATOR_TOKEN", "AI_GATEWAY_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    return Shell(folder, monkeypatch)
