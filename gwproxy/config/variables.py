"""The environment's variables that are known by names of their own.

Rule of the room: names only; what a variable says is read where its key is.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

# Each of the three facts about a Cloudflare gateway is known under two names.
FAMILIES: Final[Mapping[str, tuple[str, str]]] = MappingProxyType(
    {
        "account_id": ("CLOUDFLARE_ACCOUNT_ID", "AI_GATEWAY_ACCOUNT_ID"),
        "gateway_id": ("CLOUDFLARE_GATEWAY_ID", "AI_GATEWAY_ID"),
        "token": ("CLOUDFLARE_API_TOKEN", "AI_GATEWAY_TOKEN"),
    }
)

BREAKER_VARIABLES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "CIRCUIT_BREAKER_FAILURE_THRESHOLD": "failure_threshold",
        "CIRCUIT_BREAKER_SUCCESS_THRESHOLD": "success_threshold",
        "CIRCUIT_BREAKER_OPEN_TIMEOUT": "open_timeout_ms",
    }
)


def family(variable: str) -> tuple[str, ...]:
    """A variable followed by its other name, if it has one."""
    for pair in FAMILIES.values():
        if variable in pair:
            return (variable, *(name for name in pair if name != variable))
    return (variable,)
