"""The story of one request, in seven verbs:
authenticate, parse, quote, reserve, send, relay, settle.
"""

import asyncio
import functools
import random
from collections.abc import Callable
from typing import Final

from aiohttp import web

from gwproxy.core.chat import ChatRequest, as_stream
from gwproxy.core.errors import InsufficientQuota, ModelNotFound
from gwproxy.core.identity import OnClientGone, Principal
from gwproxy.core.routing import Routes, ordered
from gwproxy.core.trace import Trace
from gwproxy.core.upstream_words import passed_on
from gwproxy.metrics import Metrics
from gwproxy.proxy.answer import Answer
from gwproxy.proxy.dispatch import Dispatch
from gwproxy.proxy.intake import Intake
from gwproxy.proxy.relay import Relay
from gwproxy.proxy.reply import Reply
from gwproxy.state.accounts import fields
from gwproxy.state.books import Books
from gwproxy.state.keyring import Keyring
from gwproxy.state.reservation import Outcome, Quote, Reservation

_JSON: Final = "Content-Type: application/json\r\n"

# nginx in front of us would collect events into blocks.
_STREAM: Final = (
    "Content-Type: text/event-stream; charset=utf-8\r\n"
    "Cache-Control: no-cache\r\n"
    "X-Accel-Buffering: no\r\n"
)


class ChatHandler:
    """`POST /v1/chat/completions`."""

    def __init__(
        self,
        *,
        keyring: Keyring,
        intake: Intake,
        routes: Routes,
        books: Books,
        dispatch: Dispatch,
        metrics: Metrics,
        clock: Callable[[], float],
    ) -> None:
        """`clock` gives seconds since 1970."""
        self._keyring = keyring
        self._intake = intake
        # Names are the callers' own: kept for those in use, and no more than that.
        self._resolve = functools.lru_cache(maxsize=1024)(routes.resolve)
        self._books = books
        self._dispatch = dispatch
        self._metrics = metrics
        self._clock = clock

    async def handle(self, request: web.BaseRequest, trace: Trace) -> web.StreamResponse:
        principal = trace.principal = self._keyring.authenticate(request.headers, self._clock())
        features = self._keyring.organization_of(principal).allowed_features
        allowed = frozenset(features)
        chat = await self._intake.read(request, lambda raw: ChatRequest.parse(raw, allowed))
        trace.stream = chat.stream
        quote = await self._quote(principal, chat, trace)
        async with (
            self._books.reserve(principal, quote, trace) as reservation,
            self._dispatch.send(principal, reservation, trace) as reply,
        ):
            return await self._relay(request, reply, reservation, trace)
        # Leaving the block settles whatever was metered, on every way out.

    async def _quote(self, principal: Principal, chat: ChatRequest, trace: Trace) -> Quote:
        allowed = principal.allowed_models
        chain = self._resolve(chat.model)
        if chain is None or (allowed is not None and chat.model not in allowed):
            # One answer for both: nobody can probe for models that he may not use.
            raise ModelNotFound(
                "The model does not exist or this key may not use it. "
                "GET /v1/models lists what it may use.",
                param="model",
            )
        trace.model = chat.model
        return await self._books.quote(principal, chat, ordered(chain, random.random()))

    async def _relay(
        self, request: web.BaseRequest, reply: Reply, reservation: Reservation, trace: Trace
    ) -> web.StreamResponse:
        ours_ms = (reply.sent_at - trace.started) * 1000
        theirs_ms = 0.0
        if reply.first_byte_at:  # else a stream that was committed before it said anything
            theirs_s = reply.first_byte_at - reply.sent_at
            theirs_ms = theirs_s * 1000
            self._metrics.ttfb(trace.provider).observe(theirs_s)
        if reply.events is None:
            reservation.settle()  # before its head goes out, so that the head shows it
        lines = (
            f"x-request-id: {trace.request_id}\r\n"
            f"x-gateway-provider: {trace.provider}\r\n"
            f"x-gateway-mode: {'degraded' if reservation.degraded else 'normal'}\r\n"
            f"Server-Timing: gw;dur={ours_ms:.2f}, up;dur={theirs_ms:.1f}\r\n"
        ) + fields(reservation.figures())
        if reservation.plan.lowered is not None:
            lines += f"x-gateway-max-tokens: {reservation.plan.lowered}\r\n"
        for name, value in passed_on(reply.headers).items():
            lines += f"{name}: {value}\r\n"
        if reply.events is not None:
            return await self._relay_events(request, reply, reservation, lines + _STREAM)
        if not trace.stream:
            return Answer.whole(request, lines + _JSON, reply.whole)
        chat = reservation.quote.chat
        body = as_stream(reply.answer, include_usage=chat.include_usage)
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
            trace.error_type = failure.error_type if failure else "provider_truncated"
            trace.error_code = "stream_interrupted"
        if relay.finish():
            answer.end(request)
        elif request.transport is not None:
            # Part of an event is out: only a broken connection can say that the rest is missing.
            request.transport.abort()
        return answer
