"""By which APIs a model can be called: those that its provider has and its kind allows. Pure."""

import re

from gwproxy.core.api import Api
from gwproxy.core.pricing import Rate
from gwproxy.core.routing import Candidate
from gwproxy.core.upstream_words import path_of

ROUTES = {api: f"/v1/{api}" for api in Api} | {Api.CHAT: "/v1/chat/completions"}

_EMBEDS = re.compile(r"embed|[/@]bge-(?!reranker)|text-similarity")
_SPEECHLESS = re.compile(
    r"(?:^|[-/._])(?:tts|image|imagen|realtime|live|transcribe|whisper|rerank(?:er)?|audio|sonic"
    r"|sora|veo|ocr|moderation)(?:$|[-/._:\d])"
)
"""Kinds that no route here is for: they make or take pictures, sound and the like."""

_TALKS = (Api.CHAT, Api.RESPONSES, Api.MESSAGES)


def suits(api: Api, candidate: Candidate, rate: Rate | None) -> bool:
    """Whether this model's kind allows for this API: nobody talks to one that makes embeddings, and
    one whose output has a price makes none. A model that the table does not know may be either."""
    if rate is None or not rate.listed_as:
        return True
    embeds = _EMBEDS.search(candidate.model.lower()) is not None
    if api is Api.EMBEDDINGS:
        return embeds or not any(tier.output for tier in rate.tiers)
    return not embeds


def apis_of(candidate: Candidate, rate: Rate) -> tuple[Api, ...]:
    """The APIs by which this candidate can be called; for a model that is priced by the operator
    his word counts for what its name would say."""
    name = candidate.model.lower()
    kinds: tuple[Api, ...] = _TALKS
    if _EMBEDS.search(name):
        kinds = (Api.EMBEDDINGS,)
    elif not rate.overridden and _SPEECHLESS.search(name):
        kinds = ()
    provider = candidate.provider
    return tuple(api for api in kinds if path_of(api, provider.flavour, provider.prefix))
