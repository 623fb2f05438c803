"""What the tests of both SDKs share: the gateway with the built-in upstream behind it, configured
as its users configure it, in both flavours.
"""

from typing import Any

from gwproxy.demo import DemoUpstream
from tests.harness import UPSTREAM_TOKEN

FLAVOURS = ("cloudflare-compat", "openai")
NATIVE_FLAVOURS = FLAVOURS

_HEAD = """
[server]
listen = "127.0.0.1:0"
drain_s = 1
[admin]
key = "env:GWPROXY_ADMIN_KEY"
[upstream]
flavour = "{flavour}"
base_url = "{base_url}"
token = "env:UPSTREAM_TOKEN"
{upstream}
[prices.models."mock/*"]
input = "1.00"
output = "2.00"
"""

# A plain server takes every name as it comes; a gateway wants to know its providers.
_PROVIDERS = """
[providers.openai]
[providers.anthropic]
[providers.groq]
[providers.deepseek]
[providers.gemini]
prefix = "google-ai-studio"
model = "gemini-2.5-flash"
[providers.mock]
prefix = "mock"
[models.auto]
chain = ["gemini", { provider = "openai", model = "gpt-4o-mini" }]
"""

PAIR = """
[providers.one]
prefix = "custom-one"
[providers.two]
prefix = "custom-two"
[models.pair]
chain = [{ provider = "one", model = "prose" }, { provider = "two", model = "prose" }]
[prices.models."custom-one/*"]
input = "1.00"
output = "2.00"
[prices.models."custom-two/*"]
input = "1.00"
output = "2.00"
"""
"""A chain of two providers that have all APIs, for a configuration of a gateway."""


def demo_upstream() -> DemoUpstream:
    """To be started by whoever asks for it; it wants the token that the harness configures."""
    return DemoUpstream(token=UPSTREAM_TOKEN)


def config(demo: DemoUpstream, flavour: str, upstream: str = "") -> str:
    """The text of a configuration file. `upstream` is added to its table of that name."""
    if flavour == "openai":
        return _HEAD.format(flavour=flavour, base_url=f"{demo.url}/v1", upstream=upstream)
    base_url = demo.rest_url if flavour == "cloudflare-rest" else demo.compat_url
    head = _HEAD.format(flavour=flavour, base_url=base_url, upstream=upstream)
    return head + _PROVIDERS


TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of the coming days",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "wind": {"type": "boolean"},
                },
            },
        },
    }
]
