"""From the model a caller names to the candidates that may serve it. Pure tables; draws come in.

A caller never gets a model that he did not name, unless he named an alias or `auto`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

# The gateway's slugs, each with the friendly names that people use for it. A slug is at once the
# prefix on the compat endpoint and the key of the price table.
_ALIASES: dict[str, tuple[str, ...]] = {
    "openai": (),
    "anthropic": ("claude",),
    "google-ai-studio": ("google", "gemini"),
    "google-vertex-ai": ("vertex",),
    "workers-ai": ("cloudflare",),
    "groq": (),
    "mistral": (),
    "cohere": (),
    "perplexity-ai": ("perplexity",),
    "grok": ("xai", "x-ai"),
    "deepseek": (),
    "cerebras": (),
    "baseten": (),
    "parallel": (),
}

CATALOGUE: Mapping[str, str] = {
    name: slug for slug, aliases in _ALIASES.items() for name in (slug, *aliases)
}
"""Every known name of a provider, and the gateway's slug for it."""


COMPAT = "cloudflare-compat"
REST = "cloudflare-rest"
OPENAI = "openai"
"""What an upstream may speak; see `upstream_words` for the addresses."""

_AUTHORS = {"google-ai-studio": "google", "grok": "xai", "workers-ai": ""}
"""Cloudflare's REST API has names of its own for some providers; Workers AI's models go bare."""

_VERSION = re.compile(r"(?<=-)(\d{1,2})-(\d{1,2})(?=-|$)")


@dataclass(frozen=True, slots=True)
class Provider:
    """One upstream provider as configured. `prefix` goes before the slash of the model's name
    upstream; empty: the name goes bare. `prices` is its key in the price table."""

    name: str
    prefix: str
    prices: str
    model: str | None = None
    max_tokens_field: str = "max_tokens"
    flavour: str = COMPAT
    """What its upstream speaks; it decides how models are called there."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A provider and a model that may serve a request."""

    provider: Provider
    model: str
    """The provider's own name for the model, as the price table knows it."""
    sent: str
    """What goes into the body's `model` field of a chat request."""
    native: str
    """The same on the provider's own routes: the gateway wants no prefix there."""
    weight: int = 0
    verbatim: bool = False
    """Sent as it came: a price for the whole name comes before one for its parts."""

    @property
    def names(self) -> frozenset[str]:
        """What a key's list of models may call it."""
        return frozenset({f"{self.provider.name}/{self.model}", self.sent})


@dataclass(frozen=True, slots=True)
class Link:
    """One entry of a configured chain."""

    provider: str
    model: str | None = None
    weight: int = 0


@dataclass(frozen=True, slots=True)
class Routes:
    """Everything that resolution reads. `passthrough` is the provider that takes a name as it
    came (an OpenAI-compatible server); None where the upstream wants a prefix."""

    providers: Mapping[str, Provider]
    aliases: Mapping[str, Sequence[Link]] = field(default_factory=dict)
    passthrough: Provider | None = None
    serves_catalogue: bool = True
    """Providers that are known but not configured are served with defaults."""
    flavour: str = COMPAT
    """What the upstream of those speaks."""
    catalogue: Mapping[str, Iterable[str]] = field(default_factory=dict)
    """The models that each configured provider has a price for, for names without a prefix."""

    def resolve(self, name: str) -> tuple[Candidate, ...] | None:
        """The chain for a model's name, in the order configured; None: there is no such model."""
        links = self.aliases.get(name)
        if links is not None:
            chain = (self._candidate(link.provider, link.model, link.weight) for link in links)
            return tuple(candidate for candidate in chain if candidate is not None) or None
        for longer in self.providers.values():
            # Vertex's prefix has a slash of its own, and must not be taken for part of a model.
            if "/" in longer.prefix and name.startswith(f"{longer.prefix}/"):
                rest = name.removeprefix(f"{longer.prefix}/")
                return (candidate_of(longer, rest),) if rest else None
        head, slash, rest = name.partition("/")
        if slash and head and rest:
            provider = self._provider(head)
            if provider is not None:
                return (candidate_of(provider, rest),)
        if self.passthrough is not None:
            return (self._as_it_came(self.passthrough, name),)
        if not slash:
            # What a provider was configured for comes before what others have a price for.
            owners = [each for each in self.providers.values() if name == each.model] or [
                each
                for each in self.providers.values()
                if name in self.catalogue.get(each.prices, ())
            ]
            if len(owners) == 1:
                return (candidate_of(owners[0], name),)
        return None

    def _provider(self, word: str) -> Provider | None:
        """A provider by its name, its prefix, or an alias of its slug."""
        provider = self.providers.get(word)
        if provider is not None:
            return provider
        for provider in self.providers.values():
            if provider.prefix == word:
                return provider
        slug = CATALOGUE.get(word)
        if slug is None:
            return None
        for provider in self.providers.values():
            if slug in (provider.prefix, provider.prices):
                return provider
        return known(slug, self.flavour) if self.serves_catalogue else None

    def _candidate(self, provider: str, model: str | None, weight: int) -> Candidate | None:
        found = self._provider(provider)
        if found is None:
            return None
        model = model or found.model
        return candidate_of(found, model, weight) if model else None

    @staticmethod
    def _as_it_came(provider: Provider, name: str) -> Candidate:
        """Sent as it was named, and priced by what the name says."""
        head, _, rest = name.partition("/")
        slug = CATALOGUE.get(head) if rest else None
        if slug is not None:
            provider = replace(provider, prices=slug)
        return Candidate(provider, rest if slug else name, name, name, verbatim=True)


def known(slug: str, flavour: str = COMPAT) -> Provider:
    """A provider of the catalogue with its defaults."""
    field = max_tokens_field(slug)
    return Provider(slug, slug, slug, max_tokens_field=field, flavour=flavour)


def max_tokens_field(slug: str) -> str:
    """The field in which a provider takes the maximum: OpenAI's newer models refuse the old one."""
    return "max_completion_tokens" if slug == "openai" else "max_tokens"


def candidate_of(provider: Provider, model: str, weight: int = 0) -> Candidate:
    prefix = provider.prefix
    if provider.flavour == REST:
        author = _AUTHORS.get(prefix, prefix)
        # claude-sonnet-4.5 has its dot there alone.
        name = _VERSION.sub(r"\1.\2", model) if prefix == "anthropic" else model
        sent = native = f"{author}/{name}" if author else name
    else:
        sent = f"{prefix}/{model}" if prefix else model
        native = model if provider.flavour == COMPAT else sent
    return Candidate(provider, model, sent, native, weight)


def ordered(chain: Sequence[Candidate], draw: float) -> Sequence[Candidate]:
    """The order in which a chain is tried. `draw` is uniform in [0, 1).

    With nobody's weight positive it is the order listed; else the first is drawn by weight among
    the positive ones, and the rest follow as listed.
    """
    if len(chain) == 1:
        return chain
    total = sum(candidate.weight for candidate in chain)
    if not total:
        return chain
    point = draw * total
    for index, candidate in enumerate(chain):
        point -= candidate.weight
        if point < 0:
            return (candidate, *chain[:index], *chain[index + 1 :])
    return chain
