"""Cloudflare's management API: one account's gateways, provider keys and logs, asked over HTTPS.

What may pass by itself (limits, failures of theirs, a broken connection) is tried again where
trying again is harmless; everything else comes out as one exception with a cause and a cure.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp
import orjson

from gwproxy.cloudflare.words import Fault, curl, explain
from gwproxy.core.upstream_words import USER_AGENT

TRIES: Final = 5
DEFAULT_ALIAS: Final = "default"
"""Of a provider's stored keys the gateway uses the one with this alias."""
_FIRST_WAIT_S: Final = 0.5
_LONGEST_WAIT_S: Final = 60.0
"""Also of a `Retry-After`: who is told to wait for longer is told so instead."""
_TIMEOUT_S: Final = 60.0
_LARGEST_ANSWER_BYTES: Final = 64 << 20

Sleep = Callable[[float], Awaitable[None]]


class Refused(Exception):
    """An answer that is no success; `fault` says why, `curl` shows it."""

    def __init__(self, fault: Fault, curl: str) -> None:
        super().__init__(str(fault))
        self.fault = fault
        self.curl = curl


@dataclass(frozen=True, slots=True)
class Answer:
    result: Any
    total: int | None
    """How many rows there are on all pages."""
    date: str | None
    """The `Date` of the answer."""


@asynccontextmanager
async def session(ca_file: Path | None) -> AsyncIterator[aiohttp.ClientSession]:
    """Certificates are always checked; `ca_file` adds an authority."""
    context = ssl.create_default_context()
    if ca_file is not None:
        context.load_verify_locations(ca_file)
    connector = aiohttp.TCPConnector(ssl=context, limit=8)
    async with aiohttp.ClientSession(
        connector=connector,
        headers={"User-Agent": USER_AGENT},
        timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S),
        cookie_jar=aiohttp.DummyCookieJar(),  # the token says who we are
    ) as made:
        yield made


class Api:
    """One account. `variable` is where the token came from, for the commands that are shown."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        root: str,
        account: str,
        token: str,
        *,
        variable: str = "CLOUDFLARE_API_TOKEN",
        tries: int = TRIES,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self._session = session
        self._root = root
        self._account = account
        self._token = token
        self._variable = variable
        self._tries = tries
        self._sleep = sleep

    # -- gateways ----------------------------------------------------------------------------

    async def gateways(self) -> list[dict[str, Any]]:
        return await self._all(self._gateways())

    async def gateway(self, gateway: str) -> dict[str, Any]:
        return _object((await self.ask("GET", self._gateways(gateway))).result)

    async def create_gateway(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return _object((await self.ask("POST", self._gateways(), settings)).result)

    async def replace_gateway(self, gateway: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        return _object((await self.ask("PUT", self._gateways(gateway), settings)).result)

    async def delete_gateway(self, gateway: str) -> None:
        await self.ask("DELETE", self._gateways(gateway))

    # -- provider keys -----------------------------------------------------------------------

    async def provider_keys(self, gateway: str) -> list[dict[str, Any]]:
        return await self._all(self._gateways(gateway, "provider_configs"))

    async def store_key(self, gateway: str, provider: str, alias: str, secret: str) -> None:
        await self.ask(
            "POST", self._gateways(gateway, "provider_configs"), _key(provider, alias, secret)
        )

    async def replace_key(self, gateway: str, row: Mapping[str, Any], secret: str) -> None:
        path = self._gateways(gateway, "provider_configs", str(row["id"]))
        provider, alias = str(row["provider_slug"]), str(row.get("alias") or DEFAULT_ALIAS)
        await self.ask("PUT", path, _key(provider, alias, secret))

    async def delete_key(self, gateway: str, config_id: str) -> None:
        await self.ask("DELETE", self._gateways(gateway, "provider_configs", config_id))

    # -- logs --------------------------------------------------------------------------------

    async def logs(
        self,
        gateway: str,
        filters: Sequence[Mapping[str, Any]] = (),
        *,
        page: int = 1,
        per_page: int = 50,
        newest_first: bool = False,
    ) -> Answer:
        return await self.ask(
            "GET",
            self._gateways(gateway, "logs"),
            query={
                "page": str(page),
                "per_page": str(per_page),
                "order_by": "created_at",
                "order_by_direction": "desc" if newest_first else "asc",
                "filters": orjson.dumps(list(filters)).decode(),
            },
        )

    async def log(self, gateway: str, log_id: str) -> dict[str, Any] | None:
        """One log; None: there is none of this name, or not yet."""
        try:
            return _object((await self.ask("GET", self._gateways(gateway, "logs", log_id))).result)
        except Refused as refused:
            if refused.fault.status == 404:
                return None
            raise

    # -- tokens ------------------------------------------------------------------------------

    async def verify_token(self) -> Answer:
        """Both kinds of token have a place of their own to ask at."""
        try:
            return await self.ask("GET", "/user/tokens/verify")
        except Refused as refused:
            if refused.fault.status not in (401, 403):
                raise
            try:
                return await self.ask("GET", f"/accounts/{self._account}/tokens/verify")
            except Refused:
                raise refused from None

    # -- the wire ----------------------------------------------------------------------------

    def curl(self, method: str, *parts: str, body: object = None) -> str:
        """The command that asks for the same gateway, or a part of it."""
        return self._curl(method, self._gateways(*parts), body)

    def _curl(self, method: str, path: str, body: object = None) -> str:
        bearer = {"Authorization": f"Bearer ${self._variable}"}
        return curl(method, self._root + path, bearer, body)

    def _gateways(self, *parts: str) -> str:
        return "/".join((f"/accounts/{self._account}/ai-gateway/gateways", *parts))

    async def _all(self, path: str) -> list[dict[str, Any]]:
        rows: dict[str, dict[str, Any]] = {}
        page = 0
        while True:
            page += 1
            answer = await self.ask("GET", path, query={"page": str(page), "per_page": "50"})
            before = len(rows)
            for row in answer.result if isinstance(answer.result, list) else ():
                if isinstance(row, dict) and "id" in row:
                    rows[str(row["id"])] = row
            # How long a page is, and whether anybody counts, is theirs to say.
            if len(rows) == before or len(rows) == answer.total:
                return list(rows.values())

    async def ask(
        self,
        method: str,
        path: str,
        body: object = None,
        query: Mapping[str, str] | None = None,
    ) -> Answer:
        """One call. Only what reads is tried again: of a change nobody knows what it has done."""
        tries = self._tries if method == "GET" else 1
        # A secret may be in the body: what is shown names the fields, and no value.
        shown = None if body is None else dict.fromkeys(_object(body), "...")
        for number in range(1, tries + 1):
            fault, after_s, answer = await self._once(method, path, body, query)
            if answer is not None:
                return answer
            assert fault is not None, "no answer and no fault"
            wait_s = after_s if after_s is not None else _FIRST_WAIT_S * 2 ** (number - 1)
            if number == tries or not fault.passing or wait_s > _LONGEST_WAIT_S:
                raise Refused(fault, self._curl(method, path, shown))
            await self._sleep(wait_s)
        raise AssertionError("the last try returns or raises")

    async def _once(
        self, method: str, path: str, body: object, query: Mapping[str, str] | None
    ) -> tuple[Fault | None, float | None, Answer | None]:
        headers = {"Authorization": f"Bearer {self._token}"}
        data = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            data = orjson.dumps(body)
        try:
            async with self._session.request(
                method, self._root + path, headers=headers, data=data, params=query,
                allow_redirects=False,
            ) as response:  # fmt: skip
                raw = await response.content.read(_LARGEST_ANSWER_BYTES)
                while not response.content.at_eof() and len(raw) < _LARGEST_ANSWER_BYTES:
                    raw += await response.content.read(_LARGEST_ANSWER_BYTES)
                status, date = response.status, response.headers.get("date")
                after_s = _seconds(response.headers.get("retry-after"))
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return no_answer(self._root, error), None, None
        if not 200 <= status < 300:
            return explain(status, raw), after_s, None
        return self._read(status, raw, date)

    @staticmethod
    def _read(
        status: int, raw: bytes, date: str | None
    ) -> tuple[Fault | None, float | None, Answer | None]:
        try:
            value = orjson.loads(raw)
        except orjson.JSONDecodeError:
            value = None
        if not isinstance(value, dict) or "result" not in value:
            fault = Fault(
                status,
                None,
                "what answers is not Cloudflare's management API",
                "check [upstream] api_url, and any proxy on the way",
                passing=True,
            )
            return fault, None, None
        if value.get("success") is False:
            return explain(status, raw), None, None
        info = value.get("result_info")
        total = info.get("total_count") if isinstance(info, dict) else None
        return None, None, Answer(value["result"], total if isinstance(total, int) else None, date)


def broke_off(status: int, error: BaseException) -> Fault:
    """The answer began and did not come to its end."""
    why = "it did not end in time" if isinstance(error, TimeoutError) else "the connection ended"
    return Fault(
        status,
        None,
        f"the answer broke off after status {status}: {why}",
        "try again; where it stays so, look at the provider's status and at the gateway's log",
        passing=True,
    )


def no_answer(root: str, error: BaseException) -> Fault:
    """Nobody answered; the words of the network's error, which know no secret."""
    if isinstance(error, TimeoutError):
        why = "no answer in time"
    elif isinstance(error, aiohttp.ClientConnectorCertificateError):
        why = "its certificate is not valid here"
    else:
        why = type(error).__name__ if not str(error) else str(error)
    return Fault(
        0,
        None,
        f"{root} cannot be reached: {why}",
        "check this machine's network, DNS and firewall",
        passing=True,
    )


def served_slugs(rows: Iterable[Mapping[str, Any]]) -> set[str]:
    """The providers whose stored key is used: under another alias than this it is not."""
    return {
        str(row.get("provider_slug"))
        for row in rows
        if (row.get("alias") or DEFAULT_ALIAS) == DEFAULT_ALIAS
    }


def _key(provider: str, alias: str, secret: str) -> dict[str, Any]:
    return {
        "provider_slug": provider,
        "alias": alias,
        "default_config": alias == DEFAULT_ALIAS,
        "secret": secret,
    }


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _seconds(text: str | None) -> float | None:
    return float(text) if text is not None and text.isdecimal() else None
