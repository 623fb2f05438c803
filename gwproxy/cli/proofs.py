"""The promises, shown in seconds on the demo's own processes: a budget under a crowd, the ledger
across kill -9, who is served while the database is gone.
"""

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPMessage
from pathlib import Path
from typing import Any, Final

DOLLAR: Final = "mock/prose+len-100+delay-2500"
"""A hundred tokens, after 2.5 s: time enough for a crowd to gather."""

LONG: Final = "mock/prose+len-400+slow-20"
"""Four hundred tokens in eight seconds."""

PRICES: Final = f"""\
[prices.models."{DOLLAR}"]
input = "0"
output = "10000"
[prices.models."{LONG}"]
input = "1000"
output = "1000"
"""
"""A cent for each token of the first, a tenth of that for each of the second."""

CROWD: Final = 50
READ_EVENTS: Final = 25
PATIENCE_S: Final = 30
LOOK_EVERY_S: Final = 0.02
"""At processes of their own, which nothing here is told of; a newcomer is waiting."""


class NotShown(Exception):
    """A promise could not be shown; the words say what happened instead."""


@dataclass(frozen=True, slots=True)
class Stage:
    """The running demo. `restart` kills the gateway with -9 and starts it anew."""

    address: str
    config: Path
    environ: dict[str, str]
    admin: dict[str, str]
    restart: Callable[[], None]

    def ask(self, method: str, path: str, headers: dict[str, str], body: Any = None) -> Any:
        status, answer = self.send(method, path, headers, body)
        if status >= 300:
            raise NotShown(f"{method} {path} was answered {status}: {json.dumps(answer)}")
        return answer

    def send(
        self, method: str, path: str, headers: dict[str, str], body: Any = None
    ) -> tuple[int, Any]:
        status, _, answer = self.answer(method, path, headers, body)
        return status, answer

    def answer(
        self, method: str, path: str, headers: dict[str, str], body: Any = None
    ) -> tuple[int, HTTPMessage, Any]:
        connection = HTTPConnection(self.address, timeout=PATIENCE_S)
        sent = {**headers, "Content-Type": "application/json"}
        connection.request(method, path, None if body is None else json.dumps(body), sent)
        response = connection.getresponse()
        answer = response.read()
        connection.close()
        return response.status, response.headers, json.loads(answer)

    @property
    def database(self) -> Path:
        return self.config.parent / "gwproxy.db"

    def wait_until_ready(self, wanted: int) -> float:
        """Until readiness is answered with this status; how many seconds that took."""
        return _until(
            lambda: self.send("GET", "/health/ready", {})[0] == wanted,
            f"readiness did not become {wanted}",
        )

    def verify(self) -> bool:
        """Print what `gwproxy ledger verify` says; whether it is content."""
        _until(
            lambda: self.ask("GET", "/admin/health", self.admin)["records_behind"] == 0,
            "the database did not come up to the journal",
        )
        verified = subprocess.run(
            [sys.executable, "-m", "gwproxy", "ledger", "verify", "--config", str(self.config)],
            env=self.environ,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        print(f"   $ gwproxy ledger verify\n   {(verified.stdout or verified.stderr).strip()}")
        return verified.returncode == 0

    def key(self, user_id: str, **fields: str) -> dict[str, str]:
        """A new user's key, as the header that carries it."""
        self.ask("POST", "/admin/users", self.admin, {"user_id": user_id, **fields})
        made = self.ask("POST", f"/admin/users/{user_id}/api-keys", self.admin, {})
        return {"Authorization": f"Bearer {made['api_key']}"}


def _until(condition: Callable[[], bool], otherwise: str) -> float:
    """How many seconds it took until it held; NotShown, in these words, where it did not."""
    begun = time.monotonic()
    while not condition():
        if time.monotonic() - begun > PATIENCE_S:
            raise NotShown(otherwise)
        time.sleep(LOOK_EVERY_S)
    return time.monotonic() - begun


def _chat(model: str, **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "Go on."}], **fields}


def show_budget(stage: Stage) -> None:
    """Fifty calls at once, of a dollar each, on five dollars."""
    bob = stage.key("bob", monthly_limit_usd="5")

    def call(_: int) -> tuple[int, Any]:
        return stage.send("POST", "/v1/chat/completions", bob, _chat(DOLLAR, max_tokens=100))

    print(f"1. Exact. {CROWD} calls at once, a dollar each, by a user who may spend 5 USD a month:")
    with ThreadPoolExecutor(CROWD) as crowd:
        results = list(crowd.map(call, range(CROWD)))
    statuses = Counter(status for status, _ in results)
    refused = next((answer["error"] for status, answer in results if status == 429), None)
    (user,) = [
        scope for scope in stage.ask("GET", "/v1/usage", bob)["scopes"] if scope["scope"] == "user"
    ]
    print(
        f"   admitted {statuses[200]}, refused {statuses[429]}, spent {user['month_usage_usd']} USD"
    )
    if refused is not None:
        print(f"   a refusal: {refused['message']}")
        figures = refused["gateway"]
        print("              " + ", ".join(f"{name} {figures[name]}" for name in _SHOWN))
    if statuses != {200: 5, 429: CROWD - 5} or user["month_usage_usd"] != "5.000000000":
        raise NotShown("five of them should have been admitted, and five dollars spent")


_SHOWN: Final = ("scope", "limit_usd", "settled_usd", "held_usd", "needed_usd")


def show_recovery(stage: Stage) -> None:
    """Kill the gateway in the middle of a stream and look what the next one makes of it."""
    carol = stage.key("carol")
    connection = HTTPConnection(stage.address, timeout=PATIENCE_S)
    headers = {**carol, "Content-Type": "application/json"}
    body = json.dumps(_chat(LONG, stream=True))
    connection.request("POST", "/v1/chat/completions", body, headers)
    response = connection.getresponse()
    request_id = str(response.headers.get("x-request-id"))
    seen = 0
    for line in response:
        seen += line.startswith(b"data: {")
        if seen == READ_EVENTS:
            break
    print(f"\n2. Nothing lost. A stream of 400 tokens; after {seen} of them: kill -9.")
    stage.restart()
    try:
        while response.readline():
            pass  # what was under way when it died
    except (HTTPException, OSError):
        pass
    connection.close()
    found = stage.ask("GET", f"/v1/receipts/{request_id}", carol)
    print(
        f"   started again; its receipt: {found['outcome']}, {found['cost_usd']} USD of "
        f"{found['held_usd']} USD held"
    )
    right = stage.verify()
    if found["outcome"] != "recovered" or not right:
        raise NotShown("the stream should have been recovered, and the ledger right")


def show_outage(stage: Stage) -> None:
    """Take the database away: one organization is served within a bound, the other refused."""
    organization = {"org_id": "open", "failure_mode": "open", "fallback_daily_limit_usd": "0.10"}
    stage.ask("POST", "/admin/organizations", stage.admin, organization)
    stage.ask(
        "POST", "/admin/organizations", stage.admin, {"org_id": "closed", "failure_mode": "closed"}
    )
    dora, erin = stage.key("dora", org_id="open"), stage.key("erin", org_id="closed")
    print("\n3. Bounded in an outage. The database is deleted while it runs: rm gwproxy.db")
    stage.database.unlink()
    stage.wait_until_ready(503)
    asked = _chat("mock/prose+len-20", max_tokens=20)
    served, headers, _ = stage.answer("POST", "/v1/chat/completions", dora, asked)
    print(
        f"   an open organization: {served}, x-gateway-mode: {headers['x-gateway-mode']}, "
        f"at most {headers['x-gateway-limit-usd']} USD today"
    )
    refused, headers, answer = stage.answer("POST", "/v1/chat/completions", erin, asked)
    print(
        f"   a closed one: {refused} {answer['error']['code']}, "
        f"Retry-After: {headers['Retry-After']}"
    )
    took_s = stage.wait_until_ready(200)
    print(f"   {took_s:.1f} s later the database is made anew from the journal")
    if (served, refused) != (200, 503) or not stage.verify():
        raise NotShown("one should have been served and one refused, and the ledger right")
