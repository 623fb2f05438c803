"""The doctor: looks at everything between this machine and a provider's answer, one check after the
other, and says of each what is wrong and what to do. It changes nothing.
"""

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from email.utils import parsedate_to_datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import aiohttp

from gwproxy.cloudflare.api import DEFAULT_ALIAS, Api, Refused, served_slugs
from gwproxy.cloudflare.probe import Target, probe
from gwproxy.cloudflare.words import REJECTED_TOKEN, Fault
from gwproxy.config import Config
from gwproxy.core.pricing import PriceBook
from gwproxy.core.routing import Candidate
from gwproxy.core.usage import Usage
from gwproxy.storage import inspect
from gwproxy.storage.backup import Backups, following
from gwproxy.storage.database import BackupRefused, DatabaseRefused
from gwproxy.storage.segments import JournalRefused

CLOCK_OFF_S: Final = 30
"""Budgets change at midnight; a token's times and certificates bear some minutes, bills do not."""
LOG_WITHIN_S: Final = 10.0
"""Figures come into the log a second or two after an answer's end."""
_LOG_LOOK_S: Final = 0.5


class State(StrEnum):
    PASS = "pass"
    FAIL = "fail"
    WARN = "warn"
    SKIP = "skip"


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    state: State
    cause: str
    cure: str = ""
    curl: str = ""

    def row(self) -> dict[str, str]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be looked at."""

    config: Config
    targets: Sequence[Target]
    """The primary provider first, its fallbacks behind it."""
    candidates: Sequence[Candidate]
    """All that the configuration may send, and that needs a price."""
    prices: PriceBook
    gateway: str | None
    """None: the upstream is not Cloudflare's gateway."""
    ask_models: bool = True
    """Each answer costs a few tokens."""


@dataclass(slots=True)
class Report:
    """What the real gateway was seen to send."""

    answers: list[dict[str, Any]] = field(default_factory=list)
    logs: dict[str, dict[str, Any]] = field(default_factory=dict)
    gateway: dict[str, Any] | None = None


class Doctor:
    def __init__(
        self,
        plan: Plan,
        session: aiohttp.ClientSession,
        api: Api | None,
        *,
        wall: Callable[[], float],
        log_within_s: float = LOG_WITHIN_S,
    ) -> None:
        """`api` is None where there is no account to ask about."""
        self.report = Report()
        self.unreachable = False
        """Cloudflare did not answer at all: what could not be asked is not known to be wrong."""
        self._deaf = ""
        """Why the account is not asked anything more."""
        self._plan = plan
        self._session = session
        self._api = api
        self._wall = wall
        self._log_within_s = log_within_s
        self._date: str | None = None

    async def examine(self) -> AsyncIterator[Check]:
        """Each check as soon as it is done."""
        yield self._prices()
        yield await asyncio.to_thread(self._database)
        yield await asyncio.to_thread(self._journal)
        if self._plan.gateway is not None and self._api is not None:
            async for check in self._account(self._api, self._plan.gateway):
                yield check
        else:
            why = "the upstream is not Cloudflare's gateway"
            for name in (_TOKEN, _GATEWAY, _KEYS, _BAD_TOKEN):
                yield Check(name, State.SKIP, why)
        async for check in self._models():
            yield check
        yield await self._logs()
        yield self._clock()

    # -- this machine ------------------------------------------------------------------------

    def _prices(self) -> Check:
        book = self._plan.prices
        missing = sorted(
            {c.sent for c in self._plan.candidates if book.rate_of(c, self._wall()) is None}
        )
        if not missing:
            count = len({c.sent for c in self._plan.candidates})
            return Check(
                "prices", State.PASS, f"all {count} configured models have one ({book.version})"
            )
        lines = "; ".join(
            f'[prices.models."{name}"] input = "..." output = "..."' for name in missing
        )
        return Check(
            "prices",
            State.FAIL,
            f"no price for {', '.join(missing)}: calls to it are refused with model_not_priced",
            f"add to config.toml, in USD per million tokens: {lines}",
        )

    def _database(self) -> Check:
        path = self._plan.config.storage.path
        if not path.exists():
            folder = path.parent
            if not os.access(folder, os.W_OK | os.X_OK):
                return Check(
                    "database",
                    State.FAIL,
                    f"{folder} cannot be written to by this user",
                    f"create it and give it to the user of the service, or change [storage] path: "
                    f"install -d -m 700 {folder}",
                )
            return self._lost()
        try:
            with inspect.tables(path) as tables:
                lsn = tables.mark.lsn
        except DatabaseRefused as refused:
            return Check(
                "database",
                State.FAIL,
                str(refused),
                "run the doctor as the user of the service; gwproxy ledger verify says more",
            )
        return self._room("database", path.parent, f"{path} goes up to record {lsn}")

    def _lost(self) -> Check:
        """There is no database: what the next start will do about it."""
        storage = self._plan.config.storage
        path = storage.path
        backups = Backups(
            storage.journal, every_s=storage.backup_every_h * 3600, keep=storage.keep_backups
        )
        if not backups.any and not any(storage.journal.glob("*.journal")):
            return Check("database", State.PASS, f"{path} will be made at the first start")
        try:
            found = inspect.journal(storage.journal, 0)
            if not found.trail.segments:
                raise BackupRefused(f"there is no journal in {storage.journal}")
            source, _ = asyncio.run(backups.chosen(found.ledger_id, following(found)))
        except (BackupRefused, JournalRefused, OSError) as refused:
            return Check(
                "database",
                State.FAIL,
                f"{path} is gone, and cannot be rebuilt: {refused}",
                "put the database back, or a backup of it: gwproxy restore",
            )
        behind = source if source == "the journal alone" else f"{source} and the journal"
        return Check(
            "database",
            State.WARN,
            f"{path} is gone; the next start rebuilds it from {behind}",
            "start the server; where a disk is not mounted, mount it first",
        )

    def _journal(self) -> Check:
        storage = self._plan.config.storage
        folder = storage.journal
        if not any(folder.glob("*.journal")):
            if storage.path.exists():
                return Check(
                    "journal",
                    State.FAIL,
                    f"there is a database, and no journal in {folder}",
                    "put the journal back, or go on without it: gwproxy ledger accept-loss",
                )
            return Check("journal", State.PASS, f"{folder} will be made at the first start")
        lost = not storage.path.exists()
        try:
            applied = 0
            if not lost:
                with inspect.tables(storage.path) as tables:
                    applied = tables.mark.lsn
            found = inspect.journal(folder, applied)
        except (DatabaseRefused, JournalRefused, OSError) as refused:
            return Check(
                "journal", State.FAIL, str(refused), "run it as the user of the service; if that "
                "is not it, the words above name file and place",
            )  # fmt: skip
        behind = max(0, found.trail.end.lsn - applied)
        words = f"{folder} goes up to record {max(found.trail.end.lsn, applied)}"
        if lost:
            return self._room("journal", folder, words)
        return self._room("journal", folder, f"{words}; the database is {behind} behind")

    def _room(self, name: str, folder: Path, words: str) -> Check:
        needed = 2 * self._plan.config.storage.journal_segment_bytes
        free = shutil.disk_usage(folder).free
        if free < needed:
            return Check(
                name,
                State.WARN,
                f"{words}; only {free >> 20} MiB are free in {folder}",
                f"make room: below {needed >> 20} MiB the gateway may stop admitting requests",
            )
        return Check(name, State.PASS, f"{words}; {free >> 30} GiB free")

    def _clock(self) -> Check:
        dates = (row["headers"].get("date") for row in self.report.answers)
        date = self._date or next(filter(None, dates), "")
        try:
            theirs = parsedate_to_datetime(date).timestamp()
        except ValueError:
            return Check("clock", State.SKIP, "no answer had a date to compare it with")
        off_s = self._wall() - theirs
        if abs(off_s) > CLOCK_OFF_S:
            word = "ahead" if off_s > 0 else "behind"
            return Check(
                "clock",
                State.FAIL,
                f"this machine's clock is {abs(off_s):.0f} s {word}: budgets would change at the "
                "wrong moment",
                "set it: timedatectl set-ntp true",
                "date -u; curl -sSI https://api.cloudflare.com | grep -i ^date",
            )
        return Check("clock", State.PASS, f"within {CLOCK_OFF_S} s of Cloudflare's")

    # -- the account -------------------------------------------------------------------------

    async def _account(self, api: Api, gateway: str) -> AsyncIterator[Check]:
        yield await self._token(api)
        if self._deaf:
            for name in (_GATEWAY, _KEYS):
                yield Check(name, State.SKIP, self._deaf)
        else:
            yield await self._gateway(api, gateway)
            yield await self._keys(api, gateway)
        yield await self._bad_token()

    async def _token(self, api: Api) -> Check:
        shown = api.curl("GET")
        try:
            answer = await api.verify_token()
            self._date = answer.date
        except Refused as refused:
            self.unreachable = refused.fault.status == 0
            if self.unreachable:
                self._deaf = "Cloudflare's management API cannot be reached"
            elif refused.fault.code in REJECTED_TOKEN or refused.fault.status == 401:
                self._deaf = "the token is not accepted: see above"
            elif refused.fault.status < 500:
                self._deaf = "the token could not be verified: see above"
            return _failed(_TOKEN, refused)
        status = answer.result.get("status") if isinstance(answer.result, dict) else None
        if status not in (None, "active"):
            return Check(
                _TOKEN, State.FAIL, f"the token is {status}",
                "make a new one and set the variable that holds it", shown,
            )  # fmt: skip
        try:
            await api.gateways()
        except Refused as refused:
            return Check(
                _TOKEN, State.FAIL, f"it may not read gateways: {refused.fault.cause}",
                refused.fault.cure, refused.curl,
            )  # fmt: skip
        return Check(
            _TOKEN,
            State.PASS,
            "active, and may read (Run is tried below; Edit would change things)",
        )

    async def _gateway(self, api: Api, gateway: str) -> Check:
        shown = api.curl("GET", gateway)
        try:
            settings = await api.gateway(gateway)
        except Refused as refused:
            if refused.fault.status == 404:
                return Check(
                    _GATEWAY, State.FAIL, f'there is no gateway "{gateway}" in this account',
                    "make it: gwproxy cloudflare setup; or correct CLOUDFLARE_GATEWAY_ID", shown,
                )  # fmt: skip
            return _failed(_GATEWAY, refused)
        # Not all of it: tokens of the operator's other systems may stand there.
        self.report.gateway = {name: settings[name] for name in _SETTINGS if name in settings}
        notes = list(_notes(settings))
        if notes:
            return Check(
                _GATEWAY, State.WARN, f"{gateway}: {'; '.join(words for words, _ in notes)}",
                f"gwproxy cloudflare gateways update {gateway} "
                + " ".join(option for _, option in notes),
                shown,
            )  # fmt: skip
        return Check(_GATEWAY, State.PASS, f"{gateway}: asks for a token, keeps logs, no cache")

    async def _keys(self, api: Api, gateway: str) -> Check:
        wanted = {t.slug: t.name for t in self._plan.targets if _needs_key(t)}
        shown = api.curl("GET", gateway, "provider_configs")
        try:
            stored = served_slugs(await api.provider_keys(gateway))
        except Refused as refused:
            return _failed(_KEYS, refused)
        missing = [slug for slug in wanted if slug not in stored]
        if missing:
            # With credit bought at Cloudflare a call works without a key: the models below tell.
            return Check(
                _KEYS, State.FAIL,
                f"none is stored under the alias `{DEFAULT_ALIAS}` for {', '.join(missing)}",
                "; ".join(f"gwproxy cloudflare keys store {slug}" for slug in missing), shown,
            )  # fmt: skip
        return Check(_KEYS, State.PASS, f"stored for {', '.join(sorted(wanted)) or 'none needed'}")

    async def _bad_token(self) -> Check:
        target = next((t for t in self._plan.targets if t.cloudflare), None)
        if target is None or not self._plan.ask_models:
            return Check(_BAD_TOKEN, State.SKIP, "no model was to be asked")
        seen = await probe(self._session, target, stream=False, token="not-a-token")
        shown = target.curl(stream=False).replace(f"${target.variable}", "not-a-token")
        if seen.status in (401, 403):
            return Check(_BAD_TOKEN, State.PASS, "refused, as it should be")
        if seen.status == 200:
            return Check(
                _BAD_TOKEN, State.FAIL,
                "the gateway answers whoever knows its address, and the provider's bill is yours",
                f"gwproxy cloudflare gateways update {self._plan.gateway} --authentication on",
                shown,
            )  # fmt: skip
        fault = seen.fault or _UNCLEAR
        return Check(_BAD_TOKEN, State.WARN, f"not to be told: {fault.cause}", fault.cure, shown)

    # -- the models --------------------------------------------------------------------------

    async def _models(self) -> AsyncIterator[Check]:
        targets = self._plan.targets
        if not targets:
            yield Check(
                _PRIMARY, State.FAIL, "no provider with a model is configured",
                "write a [providers.NAME] with its model into config.toml",
            )  # fmt: skip
            return
        if not self._plan.ask_models:
            for name in (_UNIFIED, _PRIMARY, _FALLBACK):
                yield Check(name, State.SKIP, "asking a model costs a little: not wanted")
            return
        first, *others = targets
        yield await self._ask(_UNIFIED, first, stream=False)
        yield await self._ask(_PRIMARY, first, stream=True)
        if not others:
            yield Check(_FALLBACK, State.SKIP, "none is configured")
        for target in others:
            yield await self._ask(f"{_FALLBACK} {target.name}", target, stream=True)

    async def _ask(self, name: str, target: Target, *, stream: bool) -> Check:
        seen = await probe(self._session, target, stream=stream)
        self.report.answers.append(seen.row())
        if seen.fault is not None:
            cure = seen.fault.cure.replace("PROVIDER", target.slug)
            if self._plan.gateway is not None:
                cure = cure.replace("update ID", f"update {self._plan.gateway}")
            return Check(
                name, State.FAIL, f"{target.model}: {seen.fault.cause}", cure, target.curl(stream)
            )
        cause = f"{target.model}: 200 in {seen.total_ms} ms"
        if seen.usage is None:
            return Check(
                name, State.WARN, f"{cause}, and without usage",
                "nothing to do: tokens are counted here instead", target.curl(stream),
            )  # fmt: skip
        if stream and seen.content_type != "text/event-stream":
            return Check(
                name, State.WARN, f"{cause}, in one piece although a stream was asked for",
                "guardrails at the gateway hold answers back; turn them off for streams",
                target.curl(stream),
            )  # fmt: skip
        ending = ", no [DONE]" if stream and not seen.done else ""
        usage = Usage.from_openai(seen.usage)
        tokens = f"{usage.input_total} in, {usage.output} out" if usage else "unreadable usage"
        return Check(name, State.PASS, f"{cause}, {tokens}{ending}")

    # -- the log -----------------------------------------------------------------------------

    async def _logs(self) -> Check:
        api, gateway = self._api, self._plan.gateway
        if api is None or gateway is None:
            return Check(_LOGS, State.SKIP, "there is no gateway to ask")
        if self._deaf:
            return Check(_LOGS, State.SKIP, self._deaf)
        shown = api.curl("GET", gateway, "logs") + " -G -d per_page=1"
        try:
            answer = await api.logs(gateway, per_page=1, newest_first=True)
        except Refused as refused:
            return _failed(_LOGS, refused)
        answers = self.report.answers
        wanted = [row["log_id"] for row in answers if row["log_id"] and row["fault"] is None]
        if not wanted:
            return Check(_LOGS, State.PASS, f"readable, {answer.total or 0} in all")
        missing = await self._await_logs(api, gateway, wanted)
        if missing:
            return Check(
                _LOGS, State.FAIL,
                f"readable, but {len(missing)} of {len(wanted)} requests are not in it after "
                f"{self._log_within_s:g} s",
                f"gwproxy cloudflare gateways update {gateway} --collect-logs on; when it is on, "
                "the log may be full: delete old ones, or let it delete the oldest",
                shown,
            )  # fmt: skip
        late = [log_id for log_id, row in self.report.logs.items() if row.get("cost") is None]
        words = f"readable, with the {len(wanted)} requests just made"
        if late:
            words += f"; {len(late)} of them without a cost"
        return Check(_LOGS, State.PASS, words)

    async def _await_logs(self, api: Api, gateway: str, wanted: Sequence[str]) -> list[str]:
        missing = list(dict.fromkeys(wanted))
        left_s = self._log_within_s
        while True:
            for log_id in list(missing):
                row = await api.log(gateway, log_id)
                if row is not None:
                    self.report.logs[log_id] = row
                    if row.get("cost") is not None or left_s <= 0:
                        missing.remove(log_id)
            if not missing or left_s <= 0:
                return [log_id for log_id in missing if log_id not in self.report.logs]
            await asyncio.sleep(_LOG_LOOK_S)
            left_s -= _LOG_LOOK_S


_SETTINGS: Final = (
    *("id", "authentication", "byok_only", "cache_invalidate_on_update", "cache_ttl"),
    *("collect_logs", "log_management", "log_management_strategy", "rate_limiting_interval"),
    *("rate_limiting_limit", "rate_limiting_technique", "retry_max_attempts", "zdr"),
    "workers_ai_billing_mode",
)
_TOKEN: Final = "token"
_GATEWAY: Final = "gateway exists"
_KEYS: Final = "keys stored"
_BAD_TOKEN: Final = "bad token refused"
_UNIFIED: Final = "unified endpoint"
_PRIMARY: Final = "primary provider"
_FALLBACK: Final = "fallback provider"
_LOGS: Final = "logs readable"
_UNCLEAR: Final = Fault(0, None, "the answer was neither", "run the command below")


def _failed(name: str, refused: Refused) -> Check:
    return Check(name, State.FAIL, refused.fault.cause, refused.fault.cure, refused.curl)


def _notes(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What of a gateway's settings does not go with this proxy, and the options that mend it."""
    notes = []
    if not settings.get("authentication"):
        notes.append(("asks for no token", "--authentication on"))
    if not settings.get("collect_logs"):
        notes.append(("keeps no logs, so nothing can be reconciled", "--collect-logs on"))
    if settings.get("cache_ttl"):
        notes.append(("caches answers across tenants", "--cache-ttl 0"))
    if (settings.get("retry_max_attempts") or 1) > 1:
        notes.append(("retries by itself, and hidden attempts are billed too", "--retries 1"))
    return notes


def _needs_key(target: Target) -> bool:
    """A custom provider has its key in its own settings, Workers AI is the account's own."""
    return (
        target.cloudflare
        and not target.slug.startswith("custom-")
        and target.slug not in ("workers-ai", "mock")
    )


def all_good(checks: Sequence[Check]) -> bool:
    return all(check.state is not State.FAIL for check in checks)


def seen_words(answers: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was seen in the answers that no documentation says, for people."""
    lines = []
    for row in answers:
        if row["stream"] and row["fault"] is None:
            headers = ", ".join(name for name in row["headers"] if name.startswith("cf-aig-"))
            where = "a chunk of its own" if row["usage_without_choices"] else "a normal chunk"
            count = row["usage_events"]
            often = "once" if count == 1 else f"{count} times"
            usage = f"usage in {where}, {often}" if row["usage"] else "no usage"
            ends = "[DONE]" if row["done"] else "no [DONE]"
            lines.append(f"{row['provider']}: {usage}; {ends}; headers {headers or 'none'}")
    return lines
