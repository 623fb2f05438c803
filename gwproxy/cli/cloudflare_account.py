"""What the commands about Cloudflare share: the account of the configuration, as an API to ask."""

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import aiohttp

from gwproxy.cloudflare.api import TRIES, Api, session
from gwproxy.config import FAMILIES, Config

OPERATOR_TOKEN = "CLOUDFLARE_OPERATOR_TOKEN"


class NoAccount(Exception):
    """The configuration has no Cloudflare account to ask about; the words say what to set."""


@asynccontextmanager
async def account(
    config: Config, *, tries: int = TRIES
) -> AsyncIterator[tuple[Api, str, aiohttp.ClientSession]]:
    """(the API, the configured gateway's id, the session)."""
    upstream = config.upstream
    token = upstream.api_token or upstream.token
    if upstream.account_id is None or token is None:
        raise NoAccount(
            "This needs a Cloudflare account: set CLOUDFLARE_ACCOUNT_ID and CLOUDFLARE_API_TOKEN "
            "(and CLOUDFLARE_GATEWAY_ID), or account_id and token in [upstream]."
        )
    async with session(upstream.ca_file) as made:
        api = Api(
            made,
            upstream.api_url,
            upstream.account_id,
            token.reveal(),
            variable=token_variable(config, os.environ),
            tries=tries,
        )
        yield api, upstream.gateway_id or "default", made


def token_variable(config: Config, environ: Mapping[str, str]) -> str:
    """The variable to name in a command that is shown: the one that is set."""
    if config.upstream.api_token is not None and environ.get(OPERATOR_TOKEN):
        return OPERATOR_TOKEN
    return next((name for name in FAMILIES["token"] if environ.get(name)), FAMILIES["token"][0])
