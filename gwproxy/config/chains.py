"""A chain of providers as it is written under [models].

Rule of the room: the form alone; which providers there are, the reader knows.
"""

import tomllib
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, Final

from gwproxy.config.parsers import whole
from gwproxy.config.problems import Wrong, kind, nearest, show
from gwproxy.config.values import Place, Raw

CHAIN_LIMIT: Final = 32


@dataclass(frozen=True, slots=True)
class Link:
    """A chain's entry as it was written, before the providers are known."""

    provider: str
    model: str | None
    weight: int


_CURE: Final = (
    'write chain = ["gemini", { provider = "openai", model = "gpt-4o-mini", weight = 1 }]'
)


def chain(raw: Raw) -> tuple[Link | Wrong, ...]:
    """Entries that are none stand for themselves: who has several wants to read of all at once."""
    entries = raw.value
    if raw.variable is not None:
        entries = _list_from_text(raw.text(), _CURE)
    if not isinstance(entries, list) or not entries:
        raise Wrong("must be a list with at least one provider", _CURE)
    if len(entries) > CHAIN_LIMIT:
        raise Wrong(f"has more than {CHAIN_LIMIT} entries", "shorten it")
    links: list[Link | Wrong] = []
    for number, entry in enumerate(entries, start=1):
        try:
            links.append(_link(entry, raw.place))
        except Wrong as wrong:
            links.append(Wrong(f"entry {number}{wrong.what}", wrong.cure))
    return tuple(links)


def _link(entry: object, place: Place) -> Link:
    if isinstance(entry, str):
        return Link(entry, None, 0)
    if not isinstance(entry, dict):
        raise Wrong(f" is {kind(entry)}", _CURE)
    for key in entry.keys() - {"provider", "model", "weight"}:
        near = nearest(key, ("provider", "model", "weight"))
        raise Wrong(
            f" has an unknown key {show(key)}",
            f'did you mean "{near}"?' if near else "known are provider, model and weight",
        )
    provider, model = entry.get("provider"), entry.get("model")
    if not isinstance(provider, str) or not isinstance(model, str | None) or model == "":
        raise Wrong(" needs a provider's name as text", _CURE)
    try:
        weight = whole(0, 1_000_000)(Raw(entry.get("weight", 0), None, place))
    except Wrong as wrong:
        raise Wrong(f": weight {wrong.what}", wrong.cure) from None
    return Link(provider, model, weight)


def _list_from_text(text: str, cure: str) -> list[Any]:
    """A list in a variable: names with commas between them, or as TOML writes it."""
    if not text.lstrip().startswith("["):
        return [name.strip() for name in text.split(",") if name.strip()]
    try:
        entries = tomllib.loads(f"list = {text}", parse_float=Decimal)
    except (ValueError, InvalidOperation, RecursionError):
        raise Wrong("is not a list as TOML writes it", cure) from None
    if entries.keys() != {"list"} or not isinstance(entries["list"], list):
        raise Wrong("is not a list as TOML writes it", cure)
    return entries["list"]
