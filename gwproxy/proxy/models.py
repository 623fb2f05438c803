"""`GET /v1/models`: what the asking key may call, from the configuration and the price book."""

from collections.abc import Callable, Iterable, Iterator

from aiohttp import web

from gwproxy.core.errors import ModelNotFound
from gwproxy.core.pricing import PriceBook
from gwproxy.core.request import MODEL_NAME_LIMIT
from gwproxy.core.routing import Routes, candidate_of, known
from gwproxy.core.trace import Trace
from gwproxy.proxy.answer import json_answer
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
        self._routes = routes
        self._prices = prices
        self._clock = clock
        self._owners = dict(_names(routes, prices, extra))

    async def list(self, request: web.BaseRequest, trace: Trace) -> web.StreamResponse:
        principal = trace.principal = self._keyring.authenticate(request.headers, self._clock())
        owners: Iterable[tuple[str, str | None]] = self._owners.items()
        if principal.allowed_models is not None:
            # A key's own list may name a model otherwise than it is listed here.
            owners = ((name, self._owner(name)) for name in sorted(principal.allowed_models))
        data = [_model(name, owner) for name, owner in owners if owner is not None]
        return json_answer({"object": "list", "data": data}, trace.request_id)

    async def show(
        self, request: web.BaseRequest, trace: Trace, model_id: str
    ) -> web.StreamResponse:
        principal = trace.principal = self._keyring.authenticate(request.headers, self._clock())
        allowed = principal.allowed_models
        owner = self._owner(model_id) if allowed is None or model_id in allowed else None
        if owner is None:
            raise ModelNotFound(
                "The model does not exist or this key may not use it.", param="model"
            )
        return json_answer(_model(model_id, owner), trace.request_id)

    def _owner(self, name: str) -> str | None:
        """Whose model this is, if it can be called: also by a name that is not listed, such as
        one with a provider's alias."""
        owner = self._owners.get(name)
        if owner is None and len(name) <= MODEL_NAME_LIMIT:
            for candidate in self._routes.resolve(name) or ():
                if self._prices.rate_of(candidate) is not None:
                    return candidate.provider.name
        return owner


def _model(name: str, owner: str) -> dict[str, object]:
    # `created` is part of the shape; when a provider made a model is not known here.
    return {"id": name, "object": "model", "created": 0, "owned_by": owner}


def _names(routes: Routes, prices: PriceBook, extra: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Every name that resolves and has a price, with its provider: aliases first."""
    for alias in routes.aliases:
        chain = routes.resolve(alias) or ()
        if any(prices.rate_of(candidate) is not None for candidate in chain):
            yield alias, "gwproxy"
    providers = list(routes.providers.values())
    if not providers and routes.serves_catalogue:
        providers = [known(slug) for slug in prices.providers()]
    for provider in providers:
        models = dict.fromkeys(prices.models(provider.prices))
        if provider.model:
            models.setdefault(provider.model)
        for model in models:
            candidate = candidate_of(provider, model)
            # A model that is asked for without a prefix upstream still needs one here.
            name = f"{provider.prefix or provider.name}/{model}"
            if prices.rate_of(candidate) is not None and routes.resolve(name) is not None:
                yield name, provider.name
    if routes.passthrough is not None:
        for name in extra:
            if "*" not in name:
                yield name, routes.passthrough.name
