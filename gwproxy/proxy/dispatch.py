"""Sending: walk the chain of candidates until one answers.

Before an answer counts any failure of an upstream may be followed by the next candidate; once it
counts nothing may. What failed is classified by `core.upstream_words`; this room only walks.
"""

import asyncio
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from urllib.parse import urlsplit

from gwproxy.core.api import Api
from gwproxy.core.errors import Draining, GatewayError
from gwproxy.core.identity import Principal
from gwproxy.core.outcomes import ALL_OF_THE_TIME, FAILURES, NO_COMPLETION, Meaning, pause_s
from gwproxy.core.request import ModelRequest
from gwproxy.core.stream import EventStream
from gwproxy.core.trace import Attempt, Trace
from gwproxy.core.upstream_words import (
    USER_AGENT,
    Verdict,
    cache_key,
    classify,
    classify_event,
    credentials,
    custom_cost,
    metadata,
    path_of,
    to_error,
)
from gwproxy.log import Log
from gwproxy.metrics import Metrics
from gwproxy.proxy.reply import Patience, Reply
from gwproxy.proxy.upstream import (
    SHUTDOWN,
    TOTAL_TIMEOUT,
    TRUNCATED,
    Connection,
    Failure,
    Origin,
    Pool,
    Upstream,
)
from gwproxy.state.providers import BUSY, OVER_BUDGET, Entry, Providers, Skip, unavailable
from gwproxy.state.reservation import Outcome, Planned, Priced, Reservation

_NOT_AN_ANSWER = Verdict(NO_COMPLETION, 502, hint=NO_COMPLETION.hint)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where and how one provider is reached. `secrets` is what must not be passed on should the
    upstream echo it."""

    pool: Pool
    root: str
    """The path that an API's own is appended to."""
    flavour: str
    token: str | None
    gateway: str | None
    """The gateway's id, where the address does not say it."""
    cloudflare: bool
    secrets: tuple[str, ...]
    heads: dict[tuple[Api, str], bytes] = field(default_factory=dict)
    """By API and prefix, which are few: the part of a request that never changes."""

    @classmethod
    def build(
        cls,
        upstream: Upstream,
        *,
        root: str,
        flavour: str,
        token: str | None,
        gateway: str | None = None,
    ) -> "Endpoint":
        """`root` is what the flavour appends its path to; the configuration has checked it."""
        url = urlsplit(root)
        tls = url.scheme == "https"
        assert url.hostname is not None, "an address without a host passed the configuration"
        origin = Origin(tls, url.hostname, url.port or (443 if tls else 80))
        return cls(
            upstream.pool(origin),
            url.path,
            flavour,
            token,
            gateway,
            flavour.startswith("cloudflare"),
            (token,) if token else (),
        )

    def head(self, api: Api, prefix: str) -> bytes:
        """Of a call of `api` at the provider with this prefix."""
        key = api, prefix
        head = self.heads.get(key)
        if head is None:
            head = self.heads[key] = self._head(api, prefix)
        return head

    def _head(self, api: Api, prefix: str) -> bytes:
        path = path_of(api, self.flavour, prefix)
        assert path is not None, "a candidate without this API was asked for it"
        origin = self.pool.origin
        lines = [
            f"POST {self.root}{path} HTTP/1.1",
            f"Host: {origin.authority}",
            f"User-Agent: {USER_AGENT}",
            "Accept: application/json, text/event-stream",
            # The meter reads plain bytes.
            "Accept-Encoding: identity",
            "Content-Type: application/json",
        ]
        if self.token is not None:
            lines += credentials(self.flavour, api, origin.host, self.token)
        if self.gateway is not None:
            lines.append(f"cf-aig-gateway-id: {self.gateway}")
        if self.cloudflare:
            lines += [
                # A hidden retry is an attempt that is billed and that nobody sees.
                "cf-aig-max-attempts: 1",
                # Prompts and answers stay out of the gateway's log; its figures remain.
                "cf-aig-collect-log-payload: false",
            ]
        return "".join(f"{line}\r\n" for line in lines).encode("ascii")

    def request_head(
        self,
        principal: Principal,
        trace: Trace,
        request: ModelRequest,
        priced: Priced,
        attempt: int,
        body: bytes,
        *,
        cache: bool,
    ) -> bytes:
        """`cache`: the caller's organization lets the gateway answer from its cache."""
        head = self.head(request.api, priced.candidate.provider.prefix)
        parts = [head, request.header_lines, b"Content-Length: %d\r\n" % len(body)]
        if self.cloudflare:
            ids = (principal.user_id, principal.org_id, principal.key_id, trace.request_id)
            parts.append(b"cf-aig-metadata: %b\r\n" % metadata(*ids, attempt))
            if cache:
                place = f"{request.api}/{priced.candidate.provider.name}"
                key = cache_key(principal.org_id, place, body)
                parts.append(b"cf-aig-cache-key: %b\r\n" % key)
            else:
                parts.append(b"cf-aig-skip-cache: true\r\n")
            if priced.rate.overridden:
                tier = priced.rate.tiers[0]
                cost = custom_cost(tier.input, tier.output, tier.cache_read, tier.cache_write)
                parts.append(b"cf-aig-custom-cost: %b\r\n" % cost)
        parts.append(b"\r\n")
        return b"".join(parts)


class Dispatch:
    """The providers' endpoints, and the sending of a request along its chain."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        now: Callable[[], float],
        clock: Callable[[], float],
        *,
        endpoints: Mapping[str, Endpoint],
        default: Endpoint,
        providers: Providers,
        patience: Patience,
        retries: int,
        metrics: Metrics,
        log: Log,
    ) -> None:
        """`now` gives monotonic seconds, `clock` those since 1970. `default` serves the providers
        without a table. `retries`: how often the last candidate of a chain is asked again."""
        self.loop = loop
        self.now = now
        self.clock = clock
        self.providers = providers
        self.patience = patience
        self.retries = retries
        self.metrics = metrics
        self.log = log
        self._endpoints = endpoints
        self._default = default

    def endpoint(self, provider: str) -> Endpoint:
        return self._endpoints.get(provider, self._default)

    def send(self, principal: Principal, reservation: Reservation, trace: Trace) -> "Sending":
        """Use as `async with`: gives the reply that counts, closes it on the way out."""
        return Sending(self, principal, reservation, trace)


class Sending:
    """One request on its way along the chain."""

    __slots__ = (
        "_busy",
        "_dispatch",
        "_entry",
        "_principal",
        "_reply",
        "_request",
        "_reservation",
        "_trace",
    )

    def __init__(
        self, dispatch: Dispatch, principal: Principal, reservation: Reservation, trace: Trace
    ) -> None:
        self._dispatch = dispatch
        self._principal = principal
        self._reservation = reservation
        self._trace = trace
        self._request: ModelRequest = reservation.quote.request
        self._reply: Reply | None = None
        self._entry: Entry | None = None
        self._busy = True
        """Whoever was passed over was so for the requests of this minute."""

    async def __aenter__(self) -> Reply:
        dispatch, reservation, trace = self._dispatch, self._reservation, self._trace
        deadline = trace.started + dispatch.patience.total_s
        failed: Verdict | None = None
        planned: Planned | None = None
        for following in reservation.chain:
            found = await self._enter(following, failed)
            if found is None:
                continue
            planned, entry = found
            result = await self._try(planned, entry)
            if isinstance(result, Reply):
                return result
            failed = result
            if not failed.outcome.may_fall_back or dispatch.now() >= deadline:
                break
        # Nobody else is left to ask: the last one once more, if that is wanted.
        for tries in range(dispatch.retries):
            if planned is None or failed is None or not failed.meaning.may_fall_back:
                break
            wait_s = pause_s(tries, failed.retry_after_s, random.random())
            if wait_s is None or dispatch.now() + wait_s >= deadline:
                break
            await asyncio.sleep(wait_s)
            found = await self._enter(planned, failed)
            if found is None:
                break
            planned, entry = found
            result = await self._try(planned, entry)
            if isinstance(result, Reply):
                return result
            failed = result
        raise self._give_up(failed)

    async def _enter(
        self, following: Planned, failed: Verdict | None
    ) -> tuple[Planned, Entry] | None:
        """Leave to ask a candidate, and what is held for it; None: it is passed over."""
        dispatch, reservation, trace = self._dispatch, self._reservation, self._trace
        provider = following.priced.candidate.provider.name
        entry = dispatch.providers.enter(provider)
        if isinstance(entry, Skip):
            self._pass_over(entry)
            return None
        if failed is None and following is reservation.chain[0]:
            return following, entry  # what the reservation was made for
        try:
            held = await reservation.next(following, failed.reason if failed else "skipped")
        except BaseException:
            entry.withdraw()
            raise
        if held is None:
            entry.withdraw()
            self._pass_over(Skip(provider, OVER_BUDGET))
            return None
        if failed is not None:
            before = trace.attempts[-1].provider
            dispatch.log.event(
                "warning",
                "Provider failed, trying next",
                request_id=trace.request_id,
                attempt=len(trace.attempts),
                provider=before,
                next=provider,
                reason=failed.reason,
                status=failed.status,
                hint=failed.hint or None,
            )
            dispatch.metrics.fallback(before, provider, failed.reason).value += 1
        return held, entry

    def _pass_over(self, skip: Skip) -> None:
        self._busy = self._busy and skip.why == BUSY
        self._dispatch.providers.tell(self._trace, (skip,))
        self._reservation.notes += (str(skip),)

    async def _try(self, planned: Planned, entry: Entry) -> Reply | Verdict:
        """One attempt; the provider's breaker is told what came of it."""
        dispatch, trace = self._dispatch, self._trace
        # What goes well at once is for those who look for it.
        told = bool(trace.attempts) or dispatch.log.debugging
        if told:
            self._tell("Attempting provider", planned, len(trace.attempts) + 1)
        try:
            result = await self._attempt(planned)
        except BaseException:
            entry.left()
            raise
        attempt = trace.attempts[-1]
        if isinstance(result, Reply):
            self._entry = entry
            began = dispatch.now() - attempt.duration_s

            def answered() -> None:
                entry.answered(dispatch.now() - began)
                if told:
                    self._tell("Provider succeeded", planned, len(trace.attempts))

            if result.events is None or result.events.committed:
                answered()
            else:
                result.on_words = answered
            return result
        entry.ended(result.outcome)
        attempt.reason = result.reason
        attempt.error_type = result.error_type
        return result

    def _tell(self, event: str, planned: Planned, attempt: int) -> None:
        """What comes after a failure is for everybody."""
        self._dispatch.log.event(
            "info" if attempt > 1 else "debug",
            event,
            request_id=self._trace.request_id,
            attempt=attempt,
            provider=planned.priced.candidate.provider.name,
        )

    def _give_up(self, verdict: Verdict | None) -> GatewayError:
        """The last candidate's failure, logged where it is not the caller's own."""
        trace = self._trace
        if verdict is None:
            # They were all there when the request was admitted: nothing was sent, nothing counts.
            self._reservation.outcome = Outcome.VOID
            return unavailable(trace.wait_s, busy=self._busy)
        if verdict.meaning not in (Meaning.CALLER_ERROR, Meaning.POLICY_BLOCK):
            self._dispatch.log.event(
                "error",
                "All providers failed",
                request_id=trace.request_id,
                attempts=len(trace.attempts),
                provider=trace.attempts[-1].provider,
                reason=verdict.reason,
                status=verdict.status,
                hint=verdict.hint or None,
            )
        return to_error(verdict)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        reply, entry = self._reply, self._entry
        if reply is None:
            return
        if entry is not None and reply.events is not None:
            self._tell_end(entry, reply, reply.events)
        reply.close()

    @staticmethod
    def _tell_end(entry: Entry, reply: Reply, events: EventStream) -> None:
        """How a stream that was passed on came to its end, if it did."""
        if reply.on_words is not None:
            reply.look_for_words(0)  # they may have come with its last bytes
        wordless, reply.on_words = reply.on_words is not None, None
        failure = reply.failure
        if not reply.ended or not reply.wanted or failure is SHUTDOWN:
            if wordless:
                entry.left()
        elif failure is None and events.complete:
            entry.completed()
        elif not wordless:
            entry.broke((failure or TRUNCATED).reason)
        elif failure is None and events.error is not None:
            entry.ended(classify_event(events.error).outcome)
        else:
            entry.ended(_failed(failure or TRUNCATED).outcome)

    async def _attempt(self, planned: Planned) -> Reply | Verdict:
        """One candidate: its reply, or what its failure means."""
        dispatch, trace, reservation = self._dispatch, self._trace, self._reservation
        priced, number = planned.priced, len(trace.attempts) + 1
        candidate = priced.candidate
        provider = candidate.provider.name
        endpoint = dispatch.endpoint(provider)
        request = self._request
        body = request.body_for(candidate, planned.plan.lowered)
        cache = endpoint.cloudflare and reservation.organization.cache
        head = endpoint.request_head(
            self._principal, trace, request, priced, number, body, cache=cache
        )
        began = trace.began_at = dispatch.now()
        trace.gateway_s = began - trace.started - sum(one.duration_s for one in trace.attempts)
        trace.first_byte_at = 0.0
        record = Attempt(provider, candidate.model)
        trace.attempts.append(record)
        trace.provider, trace.provider_model = provider, candidate.model
        if number == 1:
            dispatch.metrics.overhead.observe(began - trace.started)
        try:
            connection: Connection | Failure | None = endpoint.pool.idle_connection()
            while True:
                meter = reservation.attempt(planned)
                if connection is None:
                    connection = await endpoint.pool.connect()
                if isinstance(connection, Failure):
                    return _failed(connection)
                reply = Reply(
                    dispatch.loop,
                    dispatch.now,
                    connection,
                    meter,
                    dispatch.patience,
                    request=request,
                    on_accepted=reservation.answering,
                )
                reply.deadline = trace.started + dispatch.patience.total_s
                self._reply = reply
                reservation.sent()
                connection.send(reply, head, body)
                try:
                    await reply.decided
                except BaseException:
                    reply.close()
                    raise
                if reply.failure is None or not reply.failure.stale:
                    break
                connection = None  # it had been hung up: once more, on a fresh one
            record.status = reply.status or None
            trace.first_byte_at = reply.first_byte_at
            trace.log_id = reply.headers.get("cf-aig-log-id", "")[:128]
            if endpoint.cloudflare and reply.headers.get("cf-aig-cache-status") == "HIT":
                reservation.cached = True
            return self._judge(reply, endpoint)
        finally:
            record.duration_s = dispatch.now() - began

    def _judge(self, reply: Reply, endpoint: Endpoint) -> Reply | Verdict:
        """A reply that counts, or what it means instead."""
        reservation = self._reservation
        events = reply.events
        if events is not None:
            if events.error is not None and not events.committed:
                reply.close()
                reservation.refused()
                return classify_event(events.error)
            if events.committed or not reply.ended:
                return reply
            # A stream that ended without a word, as far as HTTP is concerned cleanly.
            reply.failure = reply.failure or TRUNCATED
        if reply.failure is SHUTDOWN:
            # Ours, not the provider's: no other one could do better.
            reservation.unanswered()
            raise Draining("This gateway is shutting down.", retry_after_s=1, close=True)
        if reply.status and not reply.succeeded:
            # It has said no, whether or not the words for it came whole.
            reservation.refused()
            at_s = self._dispatch.clock()
            return classify(reply.status, reply.headers, reply.body(), endpoint.secrets, at_s)
        if reply.failure is not None:
            reservation.unanswered()
            trace, total_s = self._trace, self._dispatch.patience.total_s
            waited = reply.sent_at - trace.started  # a body may come slowly, too
            if reply.failure is TOTAL_TIMEOUT and len(trace.attempts) == 1 and 2 * waited < total_s:
                return Verdict(ALL_OF_THE_TIME, 502)
            return _failed(reply.failure)
        body = reply.body()
        try:
            answer = self._request.read_answer(body)
        except ValueError:
            answer = None
        if isinstance(answer, dict) and self._request.is_answer(answer):
            if not reply.meter.observe_usage(answer) or reply.meter.usage is None:
                reply.meter.observe_answer(answer)
            reply.answer = answer
            reply.whole = body
            return reply
        if isinstance(answer, dict) and answer.get("error"):
            reservation.refused()
            return classify_event(answer["error"])
        if isinstance(answer, dict):
            reply.meter.observe_usage(answer)  # billed all the same, and no more than that
        reservation.unanswered()
        return _NOT_AN_ANSWER


def _failed(failure: Failure) -> Verdict:
    _, outcome = FAILURES[failure.reason]
    return Verdict(outcome, 502, hint=failure.hint)
