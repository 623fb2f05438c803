"""The model APIs that are spoken here, and the shape that an error has in each. Pure."""

import enum
from typing import Any

from gwproxy.core.errors import GatewayError


class Api(enum.StrEnum):
    """One API; its value is the name of its route in metrics and logs."""

    CHAT = "chat"
    EMBEDDINGS = "embeddings"
    RESPONSES = "responses"
    MESSAGES = "messages"  # Anthropic's


_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}
"""Anthropic's word for a status; its SDKs choose their exception by the status alone."""


def envelope(error: GatewayError, api: Api, request_id: str | None) -> dict[str, Any]:
    """The error as a body of this API. Anthropic's has no code; ours is added, because a program
    that wants to know why needs it."""
    if api is not Api.MESSAGES:
        return error.envelope()
    words: dict[str, Any] = {"type": anthropic_type(error.status), "message": error.message}
    if error.code is not None:
        words["code"] = error.code
    if error.param is not None:
        words["param"] = error.param
    if error.gateway is not None:
        words["gateway"] = error.gateway
    body: dict[str, Any] = {"type": "error", "error": words}
    if request_id is not None:
        body["request_id"] = request_id
    return body


def anthropic_type(status: int) -> str:
    known = _ANTHROPIC_TYPES.get(status)
    if known is not None:
        return known
    return "invalid_request_error" if 400 <= status < 500 else "api_error"
