"""The story of one request, in seven verbs:
authenticate, parse, quote, reserve, send, relay, settle.
"""

import functools
import random
from collections.abc import Callable

from aiohttp import web

from gwproxy.core.chat import ChatRequest, as_stream
from gwproxy.core.errors import ModelNotFound
from gwproxy.core.identity import Principal
from gwproxy.core.routing import Routes, ordered
from gwproxy.core.trace import Trace
from gwproxy.core.upstream_words import passed_on
from gwproxy.metrics import Metrics
from gwproxy.proxy.answer import Answer
from gwproxy.proxy.dispatch import Dispatch
from gwproxy.proxy.intake import Intake
from gwproxy.proxy.relay import Relay
from gwproxy.proxy.reply import Reply
from gwproxy.state.books import Books, Outcome, Quote, Reservation
from gwproxy.state.keyring import Keyring


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
        chat = await self._intake.read(request, ChatRequest.parse)
        trace.stream = chat.stream
        quote = self._quote(principal, chat, trace)
        async with (
            self._books.reserve(principal, quote, trace) as reservation,
            self._dispatch.send(principal, reservation, trace) as reply,
        ):
            return await self._relay(request, reply, reservation, trace)
        # Leaving the block settles whatever was metered, on every way out.

    def _quote(self, principal: Principal, chat: ChatRequest, trace: Trace) -> Quote:
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
        return self._books.quote(chat, ordered(chain, random.random()))

    async def _relay(
        self, request: web.BaseRequest, reply: Reply, reservation: Reservation, trace: Trace
    ) -> web.StreamResponse:
        self._metrics.ttfb(trace.provider).observe(reply.first_byte_at - reply.sent_at)
        headers = passed_on(reply.headers)
        headers["x-request-id"] = trace.request_id
        headers["x-gateway-provider"] = trace.provider
        headers["x-gateway-mode"] = "normal"
        ours_ms = (reply.sent_at - trace.started) * 1000
        theirs_ms = (max(reply.first_byte_at, reply.sent_at) - reply.sent_at) * 1000
        headers["Server-Timing"] = f"gw;dur={ours_ms:.2f}, up;dur={theirs_ms:.1f}"
        chat = reservation.quote.chat
        if reply.events is None and not chat.stream:
            headers["Content-Type"] = "application/json"
            reservation.settle()
            return Answer.whole(request, headers, reply.whole)

        headers["Cache-Control"] = "no-cache"
        # nginx in front of us would collect events into blocks.
        headers["X-Accel-Buffering"] = "no"
        headers["Content-Type"] = reply.headers.get("content-type", "text/event-stream")
        if reply.events is None:
            headers["Content-Type"] = "text/event-stream; charset=utf-8"
            reservation.settle()
            body = as_stream(reply.answer, include_usage=chat.include_usage)
            return Answer.whole(request, headers, body)
        return await self._relay_events(request, reply, reservation, headers)

    async def _relay_events(
        self,
        request: web.BaseRequest,
        reply: Reply,
        reservation: Reservation,
        headers: dict[str, str],
    ) -> web.StreamResponse:
        assert reply.events is not None
        dispatch = self._dispatch
        answer = Answer.stream(request, headers)
        relay = Relay(
            dispatch.loop,
            dispatch.now,
            request,
            reply,
            reply.events,
            chunked=answer.in_chunks,
            idle_s=dispatch.patience.idle_s,
        )
        self._metrics.streams_open.value += 1
        try:
            await relay.run()
        finally:
            self._metrics.streams_open.value -= 1
            self._metrics.stream_gap.observe(reply.longest_gap_s)
        whole = relay.failure is None and reply.events.complete
        reservation.outcome = Outcome.COMPLETED if whole else Outcome.TRUNCATED
        if relay.finish():
            answer.end(request)
        elif request.transport is not None:
            # Part of an event is out: only a broken connection can say that the rest is missing.
            request.transport.abort()
        return answer
