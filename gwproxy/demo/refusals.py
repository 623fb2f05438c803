"""What a gateway, an edge and a provider say instead of an answer, in their own envelopes. Pure."""

from dataclasses import dataclass
from typing import Any, Final

import orjson

JSON: Final = "application/json"
HTML: Final = "text/html; charset=UTF-8"
TEXT: Final = "text/plain; charset=UTF-8"


@dataclass(frozen=True, slots=True)
class Refusal:
    """An HTTP answer that is an error. `edge`: it never got as far as the gateway."""

    status: int
    body: bytes
    content_type: str = JSON
    edge: bool = False


_GATEWAY_CODES: Final[dict[int, tuple[int, str]]] = {
    2001: (400, "Please configure AI Gateway in the Cloudflare dashboard"),
    2003: (429, "Rate limited"),
    2005: (400, "Failed to get response from provider"),
    2008: (400, "Invalid provider"),
    2009: (401, "Unauthorized"),
    2016: (424, "Prompt blocked due to security configurations"),
    2017: (424, "Response blocked due to security configurations"),
    2018: (429, "Wholesale Rate limited"),
    2019: (400, "Chat completion bad format"),
    2021: (402, "Insufficient wholesale credits"),
    2029: (424, "Request content blocked due to DLP policy violations"),
    2030: (424, "Response content blocked due to DLP policy violations"),
    2040: (403, "Model or provider could not be resolved for spend-limit enforcement"),
    2041: (429, "Spend limit exceeded"),
    2044: (400, "Customer-provided provider credentials are required for this request"),
    2045: (429, "Spend limit exceeded: rule 'demo' (cost limit 1 per 60s, fixed)"),
    7013: (503, "Guardrail scanner unavailable"),
}
_API_CODES: Final[dict[int, tuple[int, str]]] = {
    7003: (404, "Model not found"),
    7010: (410, "Model deprecated"),
    9106: (400, "Malformed token"),
    10000: (401, "Authentication error"),
}
EDGE_STATUSES: Final = range(520, 527)
BOT_CHECK: Final = 1010

_OPENAI_ERRORS: Final[dict[int, tuple[str, str | None, str]]] = {
    400: ("invalid_request_error", None, "The request is malformed"),
    401: ("invalid_request_error", "invalid_api_key", "Incorrect API key provided"),
    403: ("permission_error", None, "You are not allowed to use this model"),
    404: ("invalid_request_error", "model_not_found", "The model does not exist"),
    413: ("invalid_request_error", "request_too_large", "The request is too large"),
    429: ("rate_limit_error", "rate_limit_exceeded", "Rate limit reached for requests"),
}
_GOOGLE_STATUSES: Final = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    429: "RESOURCE_EXHAUSTED",
    503: "UNAVAILABLE",
}


def known_code(code: int) -> bool:
    return code in _GATEWAY_CODES or code in _API_CODES or code == BOT_CHECK


def gateway(code: int, note: str = "") -> Refusal:
    """The gateway's (or its REST neighbour's) own error."""
    if code == BOT_CHECK:
        return Refusal(403, b"error code: 1010", TEXT, edge=True)
    if code in _API_CODES:
        status, message = _API_CODES[code]
        errors = [{"code": code, "message": message + note}]
        body: dict[str, Any] = {"result": None, "success": False, "errors": errors, "messages": []}
        return Refusal(status, orjson.dumps(body))
    status, message = _GATEWAY_CODES[code]
    message += note
    body = {
        "success": False,
        "result": [],
        "messages": [],
        "error": [{"code": code, "message": message}],
        "name": "AiGatewayError",
        "httpCode": status,
        "internalCode": code,
        "message": message,
        "description": message,
    }
    return Refusal(status, orjson.dumps(body))


def provider(slug: str, status: int, note: str = "") -> Refusal:
    """A provider's own error, passed through as it is; the edge's page for 520 to 526."""
    if status in EDGE_STATUSES:
        return Refusal(status, page(f"Error {status}", note), HTML, edge=True)
    kind, code, message = _OPENAI_ERRORS.get(
        status, ("server_error", None, "The server had an error while processing your request")
    )
    message += note
    if slug.startswith("google-"):
        # Google's OpenAI layer wraps its error objects in a list.
        reason = _GOOGLE_STATUSES.get(status, "INTERNAL")
        return Refusal(
            status,
            orjson.dumps([{"error": {"code": status, "message": message, "status": reason}}]),
        )
    return Refusal(status, orjson.dumps({"error": _error(message, kind, None, code)}))


def openai(status: int, message: str, param: str | None, code: str | None) -> Refusal:
    error = _error(message, "invalid_request_error", param, code)
    return Refusal(status, orjson.dumps({"error": error}))


def in_stream(note: str = "") -> dict[str, Any]:
    """The data of an event that says the stream has failed."""
    return {"error": _error("The server had an error" + note, "server_error", None, None)}


def page(title: str, note: str = "") -> bytes:
    return (
        f"<!DOCTYPE html>\n<html><head><title>{title}</title></head>"
        f"<body><h1>{title}</h1><p>This is no JSON.{note}</p></body></html>\n"
    ).encode()


def _error(message: str, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    return {"message": message, "type": kind, "param": param, "code": code}
