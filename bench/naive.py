"""The proxy people write first: aiohttp's server in front, aiohttp's client behind, no knob turned.

    python -m bench.naive --port PORT --upstream URL [--ca FILE]

It knows no key, counts no token and writes no log; it only passes bytes on. One thing is not as
people write it: the client's limit of 100 connections is lifted, else 2,000 streams would queue.
"""

import argparse
import ssl
from collections.abc import AsyncIterator

from aiohttp import ClientSession, TCPConnector, web

HOP_BY_HOP = {"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "host"}

SESSION = web.AppKey("session", ClientSession)
UPSTREAM = web.AppKey("upstream", str)


async def forward(request: web.Request) -> web.StreamResponse:
    headers = {k: v for k, v in request.headers.items() if k.lower() not in HOP_BY_HOP}
    body = await request.read()
    url = request.app[UPSTREAM] + request.path_qs
    async with request.app[SESSION].post(url, data=body, headers=headers) as answer:
        kept = {k: v for k, v in answer.headers.items() if k.lower() not in HOP_BY_HOP}
        response = web.StreamResponse(status=answer.status, headers=kept)
        await response.prepare(request)
        async for chunk in answer.content.iter_any():
            await response.write(chunk)
        await response.write_eof()
        return response


async def health(request: web.Request) -> web.Response:
    return web.json_response({"status": "ok"})


def application(upstream: str, ca: str | None) -> web.Application:
    async def session(app: web.Application) -> AsyncIterator[None]:
        context = ssl.create_default_context(cafile=ca) if ca else True
        async with ClientSession(connector=TCPConnector(limit=0, ssl=context)) as opened:
            app[SESSION] = opened
            yield

    app = web.Application()
    app[UPSTREAM] = upstream
    app.cleanup_ctx.append(session)
    app.router.add_get("/health", health)
    app.router.add_post("/v1/chat/completions", forward)
    return app


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.naive")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--upstream", required=True, help="for example http://127.0.0.1:9000")
    parser.add_argument("--ca", help="PEM file of the authority that signed the upstream")
    args = parser.parse_args()
    web.run_app(application(args.upstream, args.ca), host="127.0.0.1", port=args.port, print=None)


if __name__ == "__main__":
    main()
