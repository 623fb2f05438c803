"""The upstream's vocabulary: its addresses, its headers, its errors, and what each error means.

Pure tables and the functions that read them. Cloudflare's words come from its public
documentation and from what others observed; where an answer fits no table, its status decides.
"""

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

import orjson

from gwproxy import __version__
from gwproxy.core.api import Api
from gwproxy.core.errors import GatewayError, UpstreamFailed, UpstreamMisconfigured
from gwproxy.core.money import Picos
from gwproxy.core.outcomes import (
    ERROR_WORDS,
    GATEWAY_CODES,
    NO_API,
    NO_CREDITS,
    NO_CREDITS_429,
    REFUSED_KEY,
    Meaning,
    Outcome,
    of_status,
)
from gwproxy.core.routing import COMPAT, OPENAI, REST

USER_AGENT = f"gwproxy/{__version__}"
"""Our own name: Cloudflare's edge answers library defaults such as Python-urllib's with a 403."""

COMPAT_ROOT = "https://gateway.ai.cloudflare.com/v1/{account}/{gateway}"

REST_ROOT = "https://api.cloudflare.com/client/v4/accounts/{account}/ai/v1"

MANAGEMENT_ROOT = "https://api.cloudflare.com/client/v4"

CHAT_PATHS = {
    COMPAT: "/compat/chat/completions",
    REST: "/chat/completions",
    OPENAI: "/chat/completions",
}
"""What each flavour appends to its root for a chat completion."""

_TAILS = {Api.EMBEDDINGS: "embeddings", Api.RESPONSES: "responses", Api.MESSAGES: "messages"}

_NATIVE_PATHS = {
    # The gateway's own address for a provider, and below it the provider's own path.
    ("openai", Api.EMBEDDINGS): "/openai/embeddings",
    ("openai", Api.RESPONSES): "/openai/responses",
    ("anthropic", Api.MESSAGES): "/anthropic/v1/messages",
    ("google-ai-studio", Api.EMBEDDINGS): "/google-ai-studio/v1beta/openai/embeddings",
    ("mistral", Api.EMBEDDINGS): "/mistral/v1/embeddings",
    ("workers-ai", Api.EMBEDDINGS): "/workers-ai/v1/embeddings",
}


_REST = frozenset(
    {
        ("openai", Api.RESPONSES),
        ("anthropic", Api.MESSAGES),
        ("workers-ai", Api.EMBEDDINGS),
    }
)
"""What the REST API has besides chat; each has the same address for all of its models."""


def path_of(api: Api, flavour: str, prefix: str) -> str | None:
    """What is appended to the root for a call of this API at this provider; None: it has none."""
    if api is Api.CHAT:
        return CHAT_PATHS[flavour]
    if flavour == OPENAI:
        return f"/{_TAILS[api]}"
    if flavour == REST:
        return f"/{_TAILS[api]}" if (prefix, api) in _REST else None
    if prefix.startswith("custom-"):
        # A custom provider is an address; what speaks one of these APIs has it below /v1.
        return f"/{prefix}/v1/{_TAILS[api]}"
    return _NATIVE_PATHS.get((prefix, api))


def credentials(flavour: str, api: Api, host: str, token: str) -> list[str]:
    """The header lines that say who we are."""
    if flavour == COMPAT:
        # Beside this header an Authorization would be forwarded to the provider as its key.
        return [f"cf-aig-authorization: Bearer {token}"]
    lines = [f"Authorization: Bearer {token}"]
    if flavour == OPENAI and api is Api.MESSAGES:
        # Anthropic takes keys in this one and nothing but other kinds of tokens in the other;
        # servers that have learned its API take either.
        key = f"x-api-key: {token}"
        lines = [key] if host.endswith("anthropic.com") else [key, *lines]
    return lines


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


def cache_key(org_id: str, place: str, body: bytes) -> bytes:
    """`cf-aig-cache-key`: the same for two requests only where they come from one organization and
    ask the same. The gateway's own key is made of the body alone, and knows no tenants."""
    return sha256(b"%b\0%b\0%b" % (org_id.encode(), place.encode(), body)).hexdigest().encode()


# -- response headers ----------------------------------------------------------------------------

_PASSED_ON = frozenset({"cf-aig-cache-status", "retry-after", "retry-after-ms"})
_PASSED_ON_NAME = re.compile(r"(?:x-ratelimit-|openai-|anthropic-ratelimit-)[a-z0-9_-]{1,64}")
_PASSED_ON_LIMIT = 512
"""Characters of a value: none of these headers needs more, and clients bound what they accept."""


def passed_on(headers: Mapping[str, str]) -> dict[str, str]:
    """The upstream's headers that a client may see: a short list, never a copy of all.

    They are written into our own head as they are, so a value that could end a line is left out.
    """
    out: dict[str, str] = {}
    for name, shown in _shown(tuple(headers)):
        value = headers[name]
        if value.isascii() and value.isprintable() and len(value) <= _PASSED_ON_LIMIT:
            out[shown] = value
    return out


@functools.lru_cache(maxsize=64)
def _shown(names: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Which of a head's names are passed on, and under which name. A provider's heads nearly all
    have the same names, so that this is seldom looked into."""
    found = []
    for name in names:
        if name in ("x-request-id", "request-id"):
            found.append((name, "x-upstream-request-id"))
        elif name in _PASSED_ON or _PASSED_ON_NAME.fullmatch(name):
            found.append((name, name))
    return tuple(found)


# -- errors --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Verdict:
    """One upstream error, classified."""

    outcome: Outcome
    status: int
    body: bytes | None = None
    """An error body in OpenAI's shape that may be passed on as it came."""
    message: str = ""
    type: str = "upstream_error"
    code: str | None = None
    hint: str = ""
    """For the log: what the operator should look at."""
    retry_after_s: int | None = None

    @property
    def meaning(self) -> Meaning:
        return self.outcome.meaning

    @property
    def error_type(self) -> str:
        return self.outcome.error_type

    @property
    def reason(self) -> str:
        return self.outcome.reason


_POLICY_WORDS = {
    2016: "The prompt was blocked by the gateway's content policy.",
    2017: "The response was blocked by the gateway's content policy.",
    2029: "The request was blocked by the gateway's data-loss policy.",
    2030: "The response was blocked by the gateway's data-loss policy.",
}


def classify(
    status: int, headers: Mapping[str, str], body: bytes, secrets: tuple[str, ...], at_s: float
) -> Verdict:
    """What an error answer means. `secrets` are never passed on, whatever the upstream echoes.
    `at_s`: when it came, in seconds since 1970."""
    retry_after_s = _retry_after_s(headers, at_s)
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        return _wordless_verdict(status, retry_after_s)
    wrapped = isinstance(value, list) and len(value) == 1
    if wrapped:
        value = value[0]  # as Google's OpenAI layer does it
    if not isinstance(value, dict):
        return _wordless_verdict(status, retry_after_s)
    code, words = _gateway_error(value)
    if code is not None:
        outcome = GATEWAY_CODES.get(code)
        if outcome is not None:
            return _gateway_verdict(code, outcome, status, retry_after_s)
        # A code of the gateway's that we do not know: its status decides, and the log tells.
        verdict = _worded_verdict(status, {"message": words}, body, retry_after_s, secrets)
        return replace(verdict, hint=verdict.hint or f"the gateway answered with its code {code}")
    error = value.get("error")
    if isinstance(error, dict):
        openai_shaped = not wrapped and {"message", "type", "param", "code"} <= error.keys()
        return _worded_verdict(status, error, body, retry_after_s, secrets, as_sent=openai_shaped)
    # Self-hosted servers: {"error": "words"}, or the words at the top.
    error = {**value, "message": error} if isinstance(error, str) else value
    if isinstance(error.get("message"), str):
        return _worded_verdict(status, error, body, retry_after_s, secrets)
    return _wordless_verdict(status, retry_after_s)


def classify_event(error: Any) -> Verdict:
    """What an error event at the head of a stream means: nothing of the answer came before it."""
    if not isinstance(error, dict):
        return _status_verdict(502, None)
    code, kind = error.get("code"), error.get("type")
    # Some servers put the HTTP status that they could no longer send into the code.
    if type(code) is int and 400 <= code < 600:
        return _status_verdict(code, None)
    words = [word for word in (code, kind) if isinstance(word, str)]
    if not _NO_CREDIT_CODES.isdisjoint(words):
        return _outcome_verdict(NO_CREDITS_429, 429)
    statuses = [ERROR_WORDS[word] for word in words if word in ERROR_WORDS]
    return _status_verdict(statuses[0] if statuses else 502, None)


def _gateway_error(value: dict[str, Any]) -> tuple[int | None, Any]:
    """The code and the words of the gateway's own error, or its management API's."""
    for field in ("error", "errors"):
        errors = value.get(field)
        if isinstance(errors, list) and errors and isinstance(errors[0], dict):
            code = errors[0].get("code")
            if type(code) is int:
                return code, errors[0].get("message")
    code = value.get("internalCode")
    return (code if type(code) is int else None), value.get("message")


def _gateway_verdict(
    code: int, outcome: Outcome, status: int, retry_after_s: int | None
) -> Verdict:
    if outcome.meaning is Meaning.POLICY_BLOCK:
        return Verdict(
            outcome,
            status if 400 <= status < 500 else 424,
            message=_POLICY_WORDS[code],
            type="invalid_request_error",
            code="content_blocked",
        )
    if outcome.meaning is Meaning.CALLER_ERROR:
        return Verdict(
            outcome,
            404,
            message="The model does not exist or was retired.",
            type="invalid_request_error",
            code="model_not_found",
        )
    return Verdict(
        outcome,
        status,
        hint=outcome.hint or f"the gateway answered with its code {code}",
        retry_after_s=retry_after_s,
    )


_NO_CREDIT_CODES = frozenset(
    {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"}
)


def _worded_verdict(
    status: int,
    error: dict[str, Any],
    body: bytes,
    retry_after_s: int | None,
    secrets: tuple[str, ...],
    *,
    as_sent: bool = False,
) -> Verdict:
    """An error with words. A caller's mistake is told in the provider's own, and with `as_sent`
    in its own body."""
    message = error.get("message")
    if not isinstance(message, str):
        message = ""
    code = _text(error.get("code"))
    kind = _text(error.get("type"))
    # Anthropic says it with a 400, OpenAI with a 429. A caller who read it would take it for our
    # own refusal, or for a mistake in his request.
    if not {code, kind}.isdisjoint(_NO_CREDIT_CODES) or "credit balance is too low" in message:
        return _outcome_verdict(NO_CREDITS_429 if status == 429 else NO_CREDITS, status)
    if _refuses_key(error.get("details")):
        return _outcome_verdict(REFUSED_KEY, status)
    verdict = _status_verdict(status, retry_after_s)
    if (
        verdict.meaning is not Meaning.CALLER_ERROR
        or not message
        or len(body) > _WORDS_LIMIT
        or _tells(body, secrets)
    ):
        return verdict
    return replace(
        verdict,
        body=body if as_sent else None,
        message=message[:4096],
        type=kind or "invalid_request_error",
        code=code or _text(error.get("status")),
    )


def _refuses_key(details: Any) -> bool:
    """Google says with a 400 that the operator's key is not valid."""
    return isinstance(details, list) and any(
        isinstance(detail, dict) and detail.get("reason") == "API_KEY_INVALID" for detail in details
    )


def _wordless_verdict(status: int, retry_after_s: int | None) -> Verdict:
    """An answer that no chat API writes: a page, plain text, nothing."""
    if status in (404, 405):
        return _outcome_verdict(NO_API, status)
    return _status_verdict(status, retry_after_s)


_WORDS_LIMIT = 64 * 1024
"""Bytes of an error body that is passed on; a longer one is a page, not an error."""

_PIECE = 12
"""Characters of a secret that are too many to pass on: whoever echoes half of it tells it too."""

_ESCAPED = re.compile(r'\\(?:u([0-9a-fA-F]{4})|(["\\/]))')


def _tells(body: bytes, secrets: tuple[str, ...]) -> bool:
    """Whether `body` holds a secret or a piece of one, also behind JSON's escapes, twice over."""
    if not secrets:
        return False
    texts = [body.decode("utf-8", "replace")]
    for _ in range(2):
        texts.append(_ESCAPED.sub(_unescaped, texts[-1]))
    for secret in filter(None, secrets):
        ends = range(min(_PIECE, len(secret)), len(secret) + 1)
        pieces = [secret[max(0, end - _PIECE) : end] for end in ends]
        if any(piece in text for text in texts for piece in pieces):
            return True
    return False


def _unescaped(match: re.Match[str]) -> str:
    return chr(int(match[1], 16)) if match[1] else match[2]


def _status_verdict(status: int, retry_after_s: int | None) -> Verdict:
    """What the status alone says."""
    outcome = of_status(status)
    if outcome.meaning is Meaning.CALLER_ERROR:
        return Verdict(
            outcome,
            status,
            message="The provider refused the request.",
            type="invalid_request_error",
        )
    return _outcome_verdict(outcome, status, retry_after_s)


def _outcome_verdict(outcome: Outcome, status: int, retry_after_s: int | None = None) -> Verdict:
    hint = outcome.hint.replace("{status}", str(status))
    return Verdict(
        outcome, status if status >= 400 else 502, hint=hint, retry_after_s=retry_after_s
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


_LONGEST_WAIT_S = 86_400

_DATES = ("%a, %d %b %Y %H:%M:%S GMT", "%A, %d-%b-%y %H:%M:%S GMT", "%a %b %d %H:%M:%S %Y")
"""The one form that is written, and two that must be read all the same (RFC 9110, 5.6.7)."""


def _retry_after_s(headers: Mapping[str, str], at_s: float) -> int | None:
    """How long the upstream asks to be left alone, in whole seconds, rounded upwards; nonsense is
    not passed on. OpenAI's milliseconds say it more exactly than the header beside them."""
    millis = _number(headers.get("retry-after-ms", ""))
    if millis is not None:
        return min(-(-millis // 1000), _LONGEST_WAIT_S)
    value = headers.get("retry-after", "")
    seconds = _number(value)
    if seconds is not None:
        return min(seconds, _LONGEST_WAIT_S)
    for form in _DATES:
        try:
            until_s = datetime.strptime(value, form).replace(tzinfo=UTC).timestamp()
        except ValueError:
            continue
        return min(max(0, math.ceil(until_s - at_s)), _LONGEST_WAIT_S)
    return None


def _number(value: str) -> int | None:
    """Of however many digits: more than ten say nothing that a smaller number would not."""
    if not value.isascii() or not value.isdigit():
        return None
    digits = value.lstrip("0")
    return int(digits or "0") if len(digits) <= 10 else 10**10


def _text(value: Any) -> str | None:
    return value[:256] if isinstance(value, str) else None
