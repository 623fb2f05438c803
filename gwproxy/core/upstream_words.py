"""The upstream's vocabulary: its addresses, its headers, its errors, and what each error means.

Pure tables and the functions that read them. Cloudflare's words come from its public
documentation and from what others observed; where an answer fits no table, its status decides.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from gwproxy import __version__
from gwproxy.core.errors import GatewayError, UpstreamFailed, UpstreamMisconfigured
from gwproxy.core.money import Picos

USER_AGENT = f"gwproxy/{__version__}"
"""Our own name: Cloudflare's edge answers library defaults such as Python-urllib's with a 403."""

COMPAT_ROOT = "https://gateway.ai.cloudflare.com/v1/{account}/{gateway}"

CHAT_PATHS = {
    "cloudflare-compat": "/compat/chat/completions",
    "openai": "/chat/completions",
}
"""What each flavour appends to its root for a chat completion."""


def custom_cost(input: Picos, output: Picos, cache_read: Picos, cache_write: Picos) -> bytes:
    """`cf-aig-custom-cost`: USD per single token, so that the gateway's log agrees with ours."""
    rates = {
        "per_token_in": input,
        "per_token_out": output,
        "per_cache_read_token": cache_read,
        "per_cache_write_token": cache_write,
    }
    # Written as decimals without an exponent: 12 places hold a pico-dollar exactly.
    parts = (f'"{name}":{rate // 10**12}.{rate % 10**12:012d}' for name, rate in rates.items())
    return ("{" + ",".join(parts) + "}").encode("ascii")


def metadata(user_id: str, org_id: str, key_id: str, request_id: str, attempt: int) -> bytes:
    """`cf-aig-metadata`: five flat scalars. A sixth is ignored; a null or nested one drops all."""
    # The ids are of a grammar without quotes or backslashes, so that nothing needs escaping.
    return (
        f'{{"user_id":"{user_id}","org_id":"{org_id}","key_id":"{key_id}",'
        f'"request_id":"{request_id}","attempt":{attempt}}}'
    ).encode("ascii")


# -- response headers ----------------------------------------------------------------------------

_PASSED_ON = frozenset({"cf-aig-cache-status", "retry-after", "retry-after-ms"})
_PASSED_ON_PREFIXES = ("x-ratelimit-", "openai-")


def passed_on(headers: Mapping[str, str]) -> dict[str, str]:
    """The upstream's headers that a client may see: a short list, never a copy of all."""
    out: dict[str, str] = {}
    for name, value in headers.items():
        if name in _PASSED_ON or name.startswith(_PASSED_ON_PREFIXES):
            out[name] = value
        elif name == "x-request-id":
            out["x-upstream-request-id"] = value
    return out


# -- errors --------------------------------------------------------------------------------------


_OVERLOADED = "provider_overloaded"


class Meaning(enum.Enum):
    """What an upstream's answer means for the chain of providers."""

    SUCCESS = "success"
    CALLER_ERROR = "caller_error"  # the request itself is wrong: told to the caller as it came
    POLICY_BLOCK = "policy_block"  # content refused by the operator's rules: told, never retried
    OPERATOR_FAULT = "operator_fault"  # token, prefix or credit: never blamed on the caller
    THROTTLED = "throttled"  # another provider may answer; the breaker does not count it
    UPSTREAM_FAILURE = "upstream_failure"  # another provider may answer; the breaker counts it

    @property
    def may_fall_back(self) -> bool:
        return self in (Meaning.THROTTLED, Meaning.UPSTREAM_FAILURE)


@dataclass(frozen=True, slots=True)
class Verdict:
    """One upstream error, classified. `reason` is a label from a closed set, `hint` for the log."""

    meaning: Meaning
    error_type: str
    reason: str
    status: int
    body: bytes | None = None
    """An error body in OpenAI's shape that may be passed on as it came."""
    message: str = ""
    type: str = "upstream_error"
    code: str | None = None
    hint: str = ""
    retry_after_s: int | None = None


_M = Meaning
_GATEWAY_CODES: dict[int, tuple[Meaning, str, str, str]] = {
    # code: (meaning, error_type, public code, what the operator should do)
    2001: (
        _M.OPERATOR_FAULT,
        "provider_auth",
        "gateway_not_found",
        "the gateway does not exist: check [upstream] account_id and gateway_id",
    ),
    2003: (_M.THROTTLED, "provider_rate_limited", "rate_limit_exceeded", ""),
    2005: (_M.UPSTREAM_FAILURE, "provider_error", "upstream_error", ""),
    2008: (
        _M.OPERATOR_FAULT,
        "provider_auth",
        "invalid_provider",
        "the gateway does not know this provider prefix: check [providers.*] prefix",
    ),
    2009: (
        _M.OPERATOR_FAULT,
        "provider_auth",
        "bad_token",
        "the gateway refused the token: check [upstream] token and its AI Gateway Run permission, "
        "or the provider key stored at the gateway",
    ),
    2016: (_M.POLICY_BLOCK, "other", "content_blocked", ""),
    2017: (_M.POLICY_BLOCK, "other", "content_blocked", ""),
    2018: (_M.THROTTLED, "provider_rate_limited", "rate_limit_exceeded", ""),
    2019: (
        _M.OPERATOR_FAULT,
        "provider_auth",
        "bad_format",
        "the gateway did not understand the model name: check [providers.*] prefix",
    ),
    2021: (
        _M.OPERATOR_FAULT,
        "provider_auth",
        "no_credits",
        "no credits at the gateway, or the model needs a stored provider key",
    ),
    2029: (_M.POLICY_BLOCK, "other", "content_blocked", ""),
    2030: (_M.POLICY_BLOCK, "other", "content_blocked", ""),
    2040: (
        _M.OPERATOR_FAULT,
        "provider_auth",
        "unresolvable",
        "the gateway could not resolve the stored key's alias or the model",
    ),
    2041: (_M.THROTTLED, "provider_rate_limited", "rate_limit_exceeded", "gateway spend limit"),
    2044: (
        _M.OPERATOR_FAULT,
        "provider_auth",
        "credentials_required",
        "the gateway has no provider key stored for this provider",
    ),
    2045: (_M.THROTTLED, "provider_rate_limited", "rate_limit_exceeded", "gateway spend limit"),
    7003: (_M.CALLER_ERROR, "caller_invalid", "model_not_found", ""),
    7010: (_M.CALLER_ERROR, "caller_invalid", "model_not_found", ""),
    7013: (_M.UPSTREAM_FAILURE, "provider_overloaded", "upstream_error", ""),
    9106: (
        _M.OPERATOR_FAULT,
        "provider_auth",
        "bad_token",
        "the token is malformed: check [upstream] token",
    ),
    10000: (
        _M.OPERATOR_FAULT,
        "provider_auth",
        "bad_token",
        "the token was refused: check [upstream] token and its permissions",
    ),
}

_POLICY_WORDS = {
    2016: "The prompt was blocked by the gateway's content policy.",
    2017: "The response was blocked by the gateway's content policy.",
    2029: "The request was blocked by the gateway's data-loss policy.",
    2030: "The response was blocked by the gateway's data-loss policy.",
}


def classify(
    status: int, headers: Mapping[str, str], body: bytes, secrets: tuple[str, ...]
) -> Verdict:
    """What an error answer means. `secrets` are never passed on, whatever the upstream echoes."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        value = None
    retry_after_s = _retry_after_s(headers)
    if isinstance(value, dict):
        gateway = _gateway_code(value)
        if gateway is not None:
            verdict = _gateway_verdict(gateway, status, retry_after_s)
            if verdict is not None:
                return verdict
        elif isinstance(value.get("error"), dict):
            return _provider_verdict(status, value["error"], body, retry_after_s, secrets)
    return _status_verdict(status, retry_after_s)


def classify_event(error: Any) -> Verdict:
    """What an error event at the head of a stream means: nothing of the answer came before it."""
    code = error.get("code") if isinstance(error, dict) else None
    # Some servers put the HTTP status that they could no longer send into the code.
    status = code if type(code) is int and 400 <= code < 600 else 502
    return _status_verdict(status, None)


def _gateway_code(value: dict[str, Any]) -> int | None:
    """The code of the gateway's own error, or its management API's; None for a provider's."""
    for field in ("error", "errors"):
        errors = value.get(field)
        if isinstance(errors, list) and errors and isinstance(errors[0], dict):
            code = errors[0].get("code")
            if type(code) is int:
                return code
    code = value.get("internalCode")
    return code if type(code) is int else None


def _gateway_verdict(code: int, status: int, retry_after_s: int | None) -> Verdict | None:
    row = _GATEWAY_CODES.get(code)
    if row is None:
        # A code of the gateway's that we do not know: its status decides, and the log tells.
        verdict = _status_verdict(status, retry_after_s)
        hint = verdict.hint or f"the gateway answered with its code {code}"
        return Verdict(
            verdict.meaning,
            verdict.error_type,
            verdict.reason,
            verdict.status,
            message=verdict.message,
            type=verdict.type,
            code=verdict.code,
            hint=hint,
            retry_after_s=retry_after_s,
        )
    meaning, error_type, public_code, hint = row
    if meaning is Meaning.POLICY_BLOCK:
        return Verdict(
            meaning,
            error_type,
            "policy_block",
            status if 400 <= status < 500 else 424,
            message=_POLICY_WORDS[code],
            type="invalid_request_error",
            code=public_code,
        )
    if meaning is Meaning.CALLER_ERROR:
        return Verdict(
            meaning,
            error_type,
            "model_not_found",
            404,
            message="The model does not exist or was retired.",
            type="invalid_request_error",
            code=public_code,
        )
    return Verdict(
        meaning,
        error_type,
        public_code,
        status,
        hint=hint or f"the gateway answered with its code {code}",
        retry_after_s=retry_after_s,
    )


def _provider_verdict(
    status: int,
    error: dict[str, Any],
    body: bytes,
    retry_after_s: int | None,
    secrets: tuple[str, ...],
) -> Verdict:
    """A provider's own error. A caller's mistake is passed on in the provider's words."""
    if status == 429 and error.get("code") == "insufficient_quota":
        # The provider's words for "the operator's account is empty"; a caller who read them would
        # take them for our own budget refusal.
        return Verdict(
            Meaning.OPERATOR_FAULT,
            "provider_auth",
            "no_credits",
            status,
            hint="the provider says that the operator's account has no credit left",
        )
    verdict = _status_verdict(status, retry_after_s)
    if verdict.meaning is not Meaning.CALLER_ERROR:
        return verdict
    message = error.get("message")
    if not isinstance(message, str) or any(s and s.encode() in body for s in secrets):
        return verdict
    openai_shaped = {"message", "type", "param", "code"} <= error.keys()
    return Verdict(
        Meaning.CALLER_ERROR,
        "caller_invalid",
        "caller_error",
        status,
        body=body if openai_shaped else None,
        message=message[:4096],
        type=_text(error.get("type")) or "invalid_request_error",
        code=_text(error.get("code")) or _text(error.get("status")),
    )


def _status_verdict(status: int, retry_after_s: int | None) -> Verdict:
    """What the status alone says."""
    if status in (401, 402, 403):
        words = {401: "credentials", 402: "credit", 403: "permission"}[status]
        return Verdict(
            Meaning.OPERATOR_FAULT,
            "provider_auth",
            f"status_{status}",
            status,
            hint=f"the upstream answered {status}: check the {words} of its account and keys",
        )
    if status in (409, 429):
        return Verdict(
            Meaning.THROTTLED,
            "provider_rate_limited",
            f"status_{status}",
            status,
            retry_after_s=retry_after_s,
        )
    if status == 408 or status >= 500:
        error_type = {
            408: "provider_timeout",
            503: "provider_overloaded",
            529: "provider_overloaded",
        }
        return Verdict(
            Meaning.UPSTREAM_FAILURE,
            error_type.get(status, "provider_error"),
            f"status_{status}" if status in (408, 500, 502, 503, 504) else "status_5xx",
            status,
            retry_after_s=retry_after_s,
        )
    if 400 <= status < 500:
        return Verdict(
            Meaning.CALLER_ERROR,
            "caller_invalid",
            "caller_error",
            status,
            message="The provider refused the request.",
            type="invalid_request_error",
        )
    # 1xx and 3xx: a redirect would carry the token to wherever it points.
    return Verdict(
        Meaning.UPSTREAM_FAILURE,
        "provider_error",
        "bad_upstream",
        502,
        hint=f"the upstream answered {status}, which no chat API does: check its address",
    )


def to_error(verdict: Verdict) -> GatewayError:
    """What the caller is told when the last candidate of a chain ended with this verdict."""
    match verdict.meaning:
        case Meaning.CALLER_ERROR | Meaning.POLICY_BLOCK:
            return GatewayError(
                verdict.message,
                status=verdict.status,
                type=verdict.type,
                code=verdict.code,
                error_type=verdict.error_type,
                body=verdict.body,
            )
        case Meaning.OPERATOR_FAULT:
            return UpstreamMisconfigured(
                "The gateway's own access to the upstream is misconfigured. "
                "Your key and your request are fine; the operator has been told."
            )
        case Meaning.THROTTLED:
            return UpstreamFailed(
                "The upstream is limiting requests at the moment.",
                status=429,
                type="rate_limit_exceeded",
                code="rate_limit_exceeded",
                error_type=verdict.error_type,
                retry_after_s=verdict.retry_after_s,
            )
        case _:
            return UpstreamFailed(
                "No provider could answer this request.",
                error_type=verdict.error_type,
                retry_after_s=verdict.retry_after_s,
            )


def _retry_after_s(headers: Mapping[str, str]) -> int | None:
    """`retry-after` in whole seconds; its date form and nonsense are not passed on."""
    value = headers.get("retry-after", "")
    return (
        min(int(value), 86_400) if value.isascii() and value.isdigit() and len(value) < 9 else None
    )


def _text(value: Any) -> str | None:
    return value[:256] if isinstance(value, str) else None
