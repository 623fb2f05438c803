"""The story of one request, in seven verbs:
authenticate, parse, quote, reserve, send, relay, settle.
"""

import asyncio
import functools
import random
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Final

from aiohttp import web
from multidict import CIMultiDictProxy

from gwproxy.core.api import Api
from gwproxy.core.errors import (
    InsufficientQuota,
    InvalidRequest,
    ModelNotFound,
    ModelNotPriced,
)
from gwproxy.core.identity import OnClientGone, Principal
from gwproxy.core.offers import suits
from gwproxy.core.pricing import PriceBook
from gwproxy.core.request import ModelRequest
from gwproxy.core.routing import Candidate, Routes, ordered
from gwproxy.core.trace import Trace
from gwproxy.core.upstream_words import passed_on, path_of
from gwproxy.intake import Intake
from gwproxy.metrics import Metrics
from gwproxy.proxy.answer import Answer
from gwproxy.proxy.dispatch import Dispatch
from gwproxy.proxy.relay import Relay
from gwproxy.proxy.reply import Reply
from gwproxy.proxy.upstream import SHUTDOWN
from gwproxy.state.accounts import fields
from gwproxy.state.books import Books
from gwproxy.state.keyring import Keyring
from gwproxy.state.providers import (
    NO_API,
    NOT_ALLOWED,
    NOT_PRICED,
    Providers,
    Skip,
    unavailable,
)
from gwproxy.state.reservation import Outcome, Quote, Reservation

_JSON: Final = "Content-Type: application/json\r\n"

# nginx in front of us would collect events into blocks.
_STREAM: Final = (
    "Content-Type: text/event-stream; charset=utf-8\r\n"
    "Cache-Control: no-cache\r\n"
    "X-Accel-Buffering: no\r\n"
)


def _ms(duration_s: float) -> str:
    """Milliseconds with two decimals, by integers: a float's format costs four times as much."""
    whole, rest = divmod(int(duration_s * 100_000), 100)
    return f"{whole}{_HUNDREDTHS[rest]}"


_HUNDREDTHS: Final = tuple(f".{number:02d}" for number in range(100))


Parse = Callable[[bytes, frozenset[str], CIMultiDictProxy[str]], ModelRequest]
"""From a body, the features that the caller's organization has, and the headers."""


class ModelHandler:
    """The route of one API that calls models."""

    def __init__(
        self,
        api: Api,
        parse: Parse,
        *,
        keyring: Keyring,
        intake: Intake,
        routes: Routes,
        prices: PriceBook,
        books: Books,
        dispatch: Dispatch,
        providers: Providers,
        metrics: Metrics,
        clock: Callable[[], float],
    ) -> None:
        """`clock` gives seconds since 1970."""
        self._keyring = keyring
        self._intake = intake
        self._api = api
        self._parse = parse
        self._routes = routes
        self._prices = prices
        # Names are the callers' own: kept for those in use, and no more than that.
        self._resolve = functools.lru_cache(maxsize=1024)(self._candidates)
        self._books = books
        self._dispatch = dispatch
        self._providers = providers
        self._metrics = metrics
        self._clock = clock

    async def handle(self, request: web.BaseRequest, trace: Trace) -> web.StreamResponse:
        principal = trace.principal = self._keyring.authenticate(
            request.headers, self._clock(), request.remote
        )
        features = self._keyring.organization_of(principal).allowed_features
        allowed = frozenset(features)
        headers = request.headers
        call = await self._intake.read(request, lambda raw: self._parse(raw, allowed, headers))
        trace.stream = call.stream
        quote = await self._quote(principal, call, trace)
        async with (
            self._books.reserve(principal, quote, trace) as reservation,
            self._dispatch.send(principal, reservation, trace) as reply,
        ):
            return await self._relay(request, reply, reservation, trace)
        # Leaving the block settles whatever was metered, on every way out.

    def _candidates(self, name: str) -> tuple[Sequence[Candidate], Sequence[Candidate]] | None:
        """Those of the model's chain that have this API, and those that do not; None: there is no
        such model."""
        chain = self._routes.resolve(name)
        if chain is None:
            return None
        able = tuple(
            candidate
            for candidate in chain
            if self._has_api(candidate)
            and suits(self._api, candidate, self._prices.rate_of(candidate))
        )
        return able, tuple(candidate for candidate in chain if candidate not in able)

    def _has_api(self, candidate: Candidate) -> bool:
        """Whether the provider has it."""
        provider = candidate.provider
        return path_of(self._api, provider.flavour, provider.prefix) is not None

    async def _quote(self, principal: Principal, call: ModelRequest, trace: Trace) -> Quote:
        allowed = principal.allowed_models
        found = self._resolve(call.model)
        if found is not None and allowed is not None and call.model not in allowed:
            found = self._permitted(found, allowed, trace)
        if found is None:
            # One answer for both: nobody can probe for models that he may not use.
            raise ModelNotFound(
                "The model does not exist or this key may not use it. "
                "GET /v1/models lists what it may use.",
                param="model",
            )
        trace.model = call.model
        chain, unable = found
        if not chain:
            why = (
                f"This is no model for {self._api}. GET /v1/models lists each model's routes."
                if any(self._has_api(each) for each in unable)
                else f"This model's provider has no API for {self._api} here. "
                "/v1/chat/completions serves every provider."
            )
            raise InvalidRequest(
                why,
                param="model",
                code="model_not_supported",
            )
        if unable:
            self._pass_over(unable, NO_API, trace)
        available = self._providers.available(ordered(chain, random.random()), trace)
        try:
            quote = await self._books.quote(principal, call, available)
        except ModelNotPriced:
            if any(self._books.has_price(principal, candidate) for candidate in chain):
                # Its price is not what is missing: who has one is not to be asked now.
                raise unavailable(trace.wait_s) from None
            raise
        if len(quote.priced) < len(available):
            priced = [each.candidate for each in quote.priced]
            self._pass_over([each for each in available if each not in priced], NOT_PRICED, trace)
        return quote

    def _permitted(
        self,
        found: tuple[Sequence[Candidate], Sequence[Candidate]],
        allowed: Collection[str],
        trace: Trace,
    ) -> tuple[Sequence[Candidate], Sequence[Candidate]] | None:
        """Of a chain whose own name a key may not use, what it may use under other names."""
        able, unable = (
            [one for one in part if not one.names.isdisjoint(allowed)] for part in found
        )
        if not able and not unable:
            return None
        permitted = (*able, *unable)
        over = [one for part in found for one in part if one not in permitted]
        self._pass_over(over, NOT_ALLOWED, trace)
        return able, unable

    def _pass_over(self, candidates: Iterable[Candidate], why: str, trace: Trace) -> None:
        self._providers.tell(trace, [Skip(each.provider.name, why) for each in candidates])

    async def _relay(
        self, request: web.BaseRequest, reply: Reply, reservation: Reservation, trace: Trace
    ) -> web.StreamResponse:
        ours_s, theirs_s = trace.gateway_s, 0.0
        if reply.first_byte_at:  # else a stream that was committed before it said anything
            theirs_s = reply.first_byte_at - trace.began_at
            self._metrics.ttfb(trace.provider).observe(reply.first_byte_at - reply.sent_at)
        if reply.events is None:
            reservation.settle()  # before its head goes out, so that the head shows it
        lines = (
            f"x-request-id: {trace.request_id}\r\n"
            f"x-gateway-provider: {trace.provider}\r\n"
            f"x-gateway-mode: {'degraded' if reservation.degraded else 'normal'}\r\n"
            f"Server-Timing: gw;dur={_ms(ours_s)}, up;dur={_ms(theirs_s)}\r\n"
            f"{fields(reservation.figures())}"
        )
        if reservation.plan.lowered is not None:
            lines += f"x-gateway-max-tokens: {reservation.plan.lowered}\r\n"
        if self._api is Api.MESSAGES:
            lines += f"request-id: {trace.request_id}\r\n"  # where Anthropic's SDKs look for it
        for name, value in passed_on(reply.headers).items():
            lines += f"{name}: {value}\r\n"
        if reply.events is not None:
            return await self._relay_events(request, reply, reservation, lines + _STREAM)
        if not trace.stream:
            return Answer.whole(request, lines + _JSON, reply.whole)
        body = reservation.quote.request.as_stream(reply.answer)
        return Answer.whole(request, lines + _STREAM, body)

    async def _relay_events(
        self,
        request: web.BaseRequest,
        reply: Reply,
        reservation: Reservation,
        lines: str,
    ) -> web.StreamResponse:
        assert reply.events is not None
        dispatch = self._dispatch
        answer = Answer.stream(request, lines)
        relay = Relay(
            dispatch.loop,
            dispatch.now,
            request,
            reply,
            reply.events,
            reservation,
            chunked=answer.in_chunks,
            idle_s=dispatch.patience.idle_s,
        )
        self._metrics.streams_open.value += 1
        try:
            await relay.run()
        except asyncio.CancelledError:
            if reply.events.done:
                # SDKs hang up on reading [DONE]: they have all that there was.
                reservation.outcome = Outcome.COMPLETED
            elif reservation.organization.on_client_gone is OnClientGone.DRAIN:
                await relay.drain()
            raise
        finally:
            self._metrics.streams_open.value -= 1
            self._metrics.stream_gap.observe(reply.longest_gap_s)
        whole = relay.failure is None and reply.events.complete
        trace, refusal = reservation.trace, relay.refusal
        reservation.outcome = Outcome.COMPLETED if whole else Outcome.TRUNCATED
        if refusal is not None:
            if isinstance(refusal, InsufficientQuota):
                reservation.outcome = Outcome.CUT
            trace.error_type, trace.error_code = refusal.error_type, refusal.code
        elif not whole:
            failure = relay.failure
            if failure is SHUTDOWN:
                reservation.outcome = Outcome.CUT  # no fault of the provider
            trace.error_type = failure.error_type if failure else "provider_truncated"
            trace.error_code = "stream_interrupted"
        if relay.finish():
            answer.end(request)
        elif request.transport is not None:
            # Part of an event is out: only a broken connection can say that the rest is missing.
            request.transport.abort()
        return answer
