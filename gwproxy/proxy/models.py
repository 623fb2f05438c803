"""`GET /v1/models`: what the asking key may call, from the configuration and the price book."""

from collections.abc import Callable, Iterable, Iterator

import orjson
from aiohttp import web

from gwproxy.core.errors import ModelNotFound
from gwproxy.core.identity import Principal
from gwproxy.core.pricing import PriceBook
from gwproxy.core.routing import Routes, candidate_of, known
from gwproxy.core.trace import Trace
from gwproxy.state.keyring import Keyring


class ModelsHandler:
    """The names are made once, at start: neither prices nor routes change while it runs."""

    def __init__(
        self,
        keyring: Keyring,
        routes: Routes,
        prices: PriceBook,
        *,
        extra: Iterable[str],
        clock: Callable[[], float],
    ) -> None:
        """`extra`: full names priced by the operator; they count where they can be resolved."""
        self._keyring = keyring
        self._clock = clock
        self._owners = dict(_names(routes, prices, extra))

    async def list(self, request: web.BaseRequest, trace: Trace) -> web.StreamResponse:
        principal = trace.principal = self._keyring.authenticate(request.headers, self._clock())
        data = [
            _model(name, owner) for name, owner in self._owners.items() if _allowed(principal, name)
        ]
        return self._response({"object": "list", "data": data}, trace)

    async def show(
        self, request: web.BaseRequest, trace: Trace, model_id: str
    ) -> web.StreamResponse:
        principal = trace.principal = self._keyring.authenticate(request.headers, self._clock())
        owner = self._owners.get(model_id)
        if owner is None or not _allowed(principal, model_id):
            raise ModelNotFound(
                "The model does not exist or this key may not use it.", param="model"
            )
        return self._response(_model(model_id, owner), trace)

    @staticmethod
    def _response(value: object, trace: Trace) -> web.Response:
        return web.Response(
            body=orjson.dumps(value),
            headers={
                "Content-Type": "application/json",
                "Server": "gwproxy",
                "x-request-id": trace.request_id,
                "x-gateway-mode": "normal",
            },
        )


def _allowed(principal: Principal, name: str) -> bool:
    return principal.allowed_models is None or name in principal.allowed_models


def _model(name: str, owner: str) -> dict[str, object]:
    # `created` is part of the shape; when a provider made a model is not known here.
    return {"id": name, "object": "model", "created": 0, "owned_by": owner}


def _names(routes: Routes, prices: PriceBook, extra: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Every name that resolves and has a price, with its provider: aliases first."""
    for alias in routes.aliases:
        chain = routes.resolve(alias) or ()
        if any(prices.rate(each.provider.prices, each.model) for each in chain):
            yield alias, "gwproxy"
    providers = list(routes.providers.values())
    if not providers and routes.serves_catalogue:
        providers = [known(slug) for slug in prices.providers()]
    for provider in providers:
        models = dict.fromkeys(prices.models(provider.prices))
        if provider.model and prices.rate(provider.prices, provider.model):
            models.setdefault(provider.model)
        for model in models:
            yield candidate_of(provider, model).sent, provider.name
    if routes.passthrough is not None:
        for name in extra:
            if "*" not in name:
                yield name, routes.passthrough.name
