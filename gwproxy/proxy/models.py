"""`GET /v1/models`: what the asking key may call, from the configuration and the price book."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from aiohttp import web

from gwproxy.core.api import Api
from gwproxy.core.errors import ModelNotFound
from gwproxy.core.offers import ROUTES, apis_of
from gwproxy.core.pricing import PriceBook
from gwproxy.core.request import MODEL_NAME_LIMIT
from gwproxy.core.routing import Candidate, Routes, candidate_of, known
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
        self._offers = dict(_names(routes, prices, extra))

    async def list(self, request: web.BaseRequest, trace: Trace) -> web.StreamResponse:
        principal = trace.principal = self._keyring.authenticate(
            request.headers, self._clock(), request.remote
        )
        offers: Iterable[tuple[str, _Offer | None]] = self._offers.items()
        if principal.allowed_models is not None:
            # A key's own list may name a model otherwise than it is listed here.
            offers = ((name, self._offer(name)) for name in sorted(principal.allowed_models))
        data = [offer.model(name) for name, offer in offers if offer is not None]
        return json_answer({"object": "list", "data": data}, trace.request_id)

    async def show(
        self, request: web.BaseRequest, trace: Trace, model_id: str
    ) -> web.StreamResponse:
        principal = trace.principal = self._keyring.authenticate(
            request.headers, self._clock(), request.remote
        )
        allowed = principal.allowed_models
        offer = self._offer(model_id) if allowed is None or model_id in allowed else None
        if offer is None:
            raise ModelNotFound(
                "The model does not exist or this key may not use it.", param="model"
            )
        return json_answer(offer.model(model_id), trace.request_id)

    def _offer(self, name: str) -> "_Offer | None":
        """Whose model this is, if it can be called: also by a name that is not listed, such as
        one with a provider's alias."""
        offer = self._offers.get(name)
        if offer is None and len(name) <= MODEL_NAME_LIMIT:
            for candidate in self._routes.resolve(name) or ():
                offer = _offer_of(candidate, self._prices)
                if offer is not None:
                    break
        return offer


@dataclass(frozen=True, slots=True)
class _Offer:
    """Whose a model is, and by which APIs it can be called."""

    owner: str
    apis: tuple[Api, ...]

    def model(self, name: str) -> dict[str, object]:
        # `created` is part of the shape; when a provider made a model is not known here.
        return {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": self.owner,
            "routes": [ROUTES[api] for api in self.apis],
        }


def _offer_of(candidate: Candidate, prices: PriceBook) -> _Offer | None:
    rate = prices.rate_of(candidate)
    apis = () if rate is None else apis_of(candidate, rate)
    return _Offer(candidate.provider.name, apis) if apis else None


def _names(routes: Routes, prices: PriceBook, extra: Iterable[str]) -> Iterator[tuple[str, _Offer]]:
    """Every name that can be called and has a price, with its provider: aliases first."""
    for alias in routes.aliases:
        chain = [_offer_of(candidate, prices) for candidate in routes.resolve(alias) or ()]
        apis = {api for offer in chain if offer is not None for api in offer.apis}
        if apis:
            yield alias, _Offer("gwproxy", tuple(api for api in Api if api in apis))
    providers = list(routes.providers.values())
    if not providers and routes.serves_catalogue:
        providers = [known(slug, routes.flavour) for slug in prices.providers()]
    for provider in providers:
        models = dict.fromkeys(prices.models(provider.prices))
        if provider.model:
            models.setdefault(provider.model)
        for model in models:
            offer = _offer_of(candidate_of(provider, model), prices)
            # A model that is asked for without a prefix upstream still needs one here.
            name = f"{provider.prefix or provider.name}/{model}"
            if offer is not None and routes.resolve(name) is not None:
                yield name, offer
    if routes.passthrough is not None:
        for name in extra:
            if "*" not in name:
                for candidate in routes.resolve(name) or ():
                    offer = _offer_of(candidate, prices)
                    if offer is not None:
                        yield name, offer
