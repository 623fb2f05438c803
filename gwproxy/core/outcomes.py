"""How an attempt at a provider can end, and what each end means: one table, read by everybody.

Pure. Each row says who is to blame, whether another provider is asked, and what the breaker makes
of it; docs/PROVIDERS.md shows the same rows.
"""

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final


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


class Effect(enum.Enum):
    """What an outcome says to the provider's breaker."""

    ALIVE = "alive"  # it is there: a probe that ends so has succeeded
    FAILED = "failed"  # one more failure in a row
    NOTHING = "nothing"  # neither


_EFFECTS: Final = {
    Meaning.SUCCESS: Effect.ALIVE,
    Meaning.CALLER_ERROR: Effect.ALIVE,
    Meaning.POLICY_BLOCK: Effect.ALIVE,
    Meaning.OPERATOR_FAULT: Effect.ALIVE,
    Meaning.THROTTLED: Effect.NOTHING,
    Meaning.UPSTREAM_FAILURE: Effect.FAILED,
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """One row. `reason` is a label from a closed set, `hint` what the operator should look at."""

    meaning: Meaning
    error_type: str
    reason: str
    hint: str = ""
    falls_back: bool | None = None
    """Whether another provider may do better; None: as the meaning says."""
    says: Effect | None = None
    """To the breaker; None: as the meaning does."""

    @property
    def may_fall_back(self) -> bool:
        return self.meaning.may_fall_back if self.falls_back is None else self.falls_back

    @property
    def effect(self) -> Effect:
        return _EFFECTS[self.meaning] if self.says is None else self.says


_M: Final = Meaning


def _operator(reason: str, hint: str) -> Outcome:
    return Outcome(_M.OPERATOR_FAULT, "provider_auth", reason, hint)


def _failure(error_type: str, reason: str, hint: str = "") -> Outcome:
    return Outcome(_M.UPSTREAM_FAILURE, error_type, reason, hint)


def _caller(reason: str) -> Outcome:
    return Outcome(_M.CALLER_ERROR, "caller_invalid", reason)


_BLOCKED: Final = Outcome(_M.POLICY_BLOCK, "other", "policy_block")
_LIMITED: Final = Outcome(_M.THROTTLED, "provider_rate_limited", "rate_limit_exceeded")
_SPENT: Final = Outcome(
    _M.THROTTLED, "provider_rate_limited", "rate_limit_exceeded", "gateway spend limit"
)

GATEWAY_CODES: Final[Mapping[int, Outcome]] = {
    2001: _operator(
        "gateway_not_found",
        "the gateway does not exist: check [upstream] account_id and gateway_id",
    ),
    2003: _LIMITED,
    2005: _failure("provider_error", "upstream_error"),
    2008: _operator(
        "invalid_provider",
        "the gateway does not know this provider prefix: check [providers.*] prefix",
    ),
    2009: _operator(
        "bad_token",
        "the gateway refused the token: check [upstream] token and its AI Gateway Run permission, "
        "or the provider key stored at the gateway",
    ),
    2016: _BLOCKED,
    2017: _BLOCKED,
    2018: _LIMITED,
    2019: _operator(
        "bad_format",
        "the gateway did not understand the model name: check [providers.*] prefix",
    ),
    2021: _operator(
        "no_credits", "no credits at the gateway, or the model needs a stored provider key"
    ),
    2029: _BLOCKED,
    2030: _BLOCKED,
    2040: _operator(
        "unresolvable", "the gateway could not resolve the stored key's alias or the model"
    ),
    2041: _SPENT,
    2044: _operator(
        "credentials_required", "the gateway has no provider key stored for this provider"
    ),
    2045: _SPENT,
    7003: _caller("model_not_found"),
    7010: _caller("model_not_found"),
    7013: _failure("provider_overloaded", "upstream_error"),
    9106: _operator("bad_token", "the token is malformed: check [upstream] token"),
    10000: _operator(
        "bad_token", "the token was refused: check [upstream] token and its permissions"
    ),
}
"""The gateway's own codes: they say more than the status that they come with."""

NO_CREDITS: Final = _operator(
    "no_credits", "the provider says that the operator's account has no credit left"
)
NO_CREDITS_429: Final = Outcome(
    _M.OPERATOR_FAULT,
    "provider_auth",
    "no_credits",
    NO_CREDITS.hint,
    falls_back=True,
    says=Effect.NOTHING,
)
"""Of a status that moves on to the next provider; whose fault it is stays the same."""

REFUSED_KEY: Final = _operator(
    "bad_token", "the provider refused the operator's key: check the one stored for it"
)


def _account(status: int, words: str) -> Outcome:
    return _operator(
        f"status_{status}",
        f"the upstream answered {status}: check the {words} of its account and keys",
    )


STATUSES: Final[Mapping[int, Outcome]] = {
    401: _account(401, "credentials"),
    402: _account(402, "credit"),
    403: _account(403, "permission"),
    408: _failure("provider_timeout", "status_408"),
    409: Outcome(_M.THROTTLED, "provider_rate_limited", "status_409"),
    429: Outcome(_M.THROTTLED, "provider_rate_limited", "status_429"),
    500: _failure("provider_error", "status_500"),
    502: _failure("provider_error", "status_502"),
    503: _failure("provider_overloaded", "status_503"),
    504: _failure("provider_error", "status_504"),
    529: _failure("provider_overloaded", "status_5xx"),
}
OTHER_4XX: Final = _caller("caller_error")
OTHER_5XX: Final = _failure("provider_error", "status_5xx")
NO_API: Final = Outcome(
    _M.OPERATOR_FAULT,
    "provider_error",
    "bad_upstream",
    "the upstream answered {status} and no error of a chat API: check its address",
)
STRANGE: Final = _failure(
    "provider_error",
    "bad_upstream",
    "the upstream answered {status}, which no chat API does: check its address",
)
"""1xx and 3xx: a redirect would carry the token to wherever it points."""

NO_COMPLETION: Final = _failure(
    "provider_error",
    "garbage",
    "the upstream answered 200, and with nothing that this API answers: check its address",
)

FAILURES: Final[Mapping[str, tuple[str, Outcome]]] = {
    "connect": ("no connection", _failure("provider_connect", "connect")),
    "tls": ("TLS or its certificate not accepted", _failure("provider_connect", "tls")),
    "connect_timeout": (
        "no connection within `connect_timeout_s`",
        _failure("provider_timeout", "connect_timeout"),
    ),
    "reset": (
        "the connection ended before an answer began",
        _failure("provider_connect", "reset"),
    ),
    "truncated": (
        "an answer that broke off, wrong framing, a stream that ended without a word",
        _failure("provider_truncated", "truncated"),
    ),
    "garbage": (
        "no HTTP, a head above 256 KiB, an answer compressed unasked",
        _failure("provider_error", "garbage"),
    ),
    "too_large": (
        "an answer above 32 MiB, of embeddings 160",
        _failure("provider_error", "too_large"),
    ),
    "first_byte_timeout": (
        "a stream's first byte not within `first_byte_timeout_s`",
        _failure("provider_timeout", "first_byte_timeout"),
    ),
    "answer_timeout": (
        "an answer in one piece, or a stream's first words, not within `answer_timeout_s`",
        _failure("provider_timeout", "answer_timeout"),
    ),
    "idle_timeout": (
        "a stream silent for `idle_timeout_s` before it counts",
        _failure("provider_timeout", "idle_timeout"),
    ),
    "total_timeout": (
        "`total_timeout_s` is over",
        # What the attempts before have used up is not this provider's fault.
        Outcome(
            _M.UPSTREAM_FAILURE,
            "provider_timeout",
            "total_timeout",
            falls_back=False,
            says=Effect.NOTHING,
        ),
    ),
}
"""What can go wrong below HTTP, by the reason that the connection gives."""

ALL_OF_THE_TIME: Final = Outcome(
    _M.UPSTREAM_FAILURE, "provider_timeout", "total_timeout", falls_back=False
)
"""Of the first attempt, before which nobody has used any of it."""

ERROR_WORDS: Final[Mapping[str, int]] = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "permission_error": 403,
    "not_found_error": 404,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "overloaded_error": 529,
}
"""The status that an error stands for which comes where no status can be sent any more."""


def of_status(status: int) -> Outcome:
    """What a status alone says."""
    found = STATUSES.get(status)
    if found is not None:
        return found
    if 400 <= status < 500:
        return OTHER_4XX
    return OTHER_5XX if status >= 500 else STRANGE


def rows() -> Iterator[tuple[str, Outcome]]:
    """All of it for people: what happened, and what that means."""
    yield "an answer, or a stream's first words", Outcome(_M.SUCCESS, "", "")
    for status, outcome in STATUSES.items():
        yield f"status {status}", outcome
    yield "other 4xx", OTHER_4XX
    yield "other 5xx, 520 to 526 among them", OTHER_5XX
    yield "1xx or 3xx: a redirect is never followed", STRANGE
    yield "404 or 405 without an error of a chat API", NO_API
    yield "429 with `insufficient_quota` or a code of its kind", NO_CREDITS_429
    yield "such a code with another status, or a credit balance that is too low", NO_CREDITS
    yield "a key that the provider refuses with a 400", REFUSED_KEY
    for code, outcome in GATEWAY_CODES.items():
        yield f"gateway code {code}", outcome
    yield (
        "200 with no answer: a page, half of JSON, another type, no choice, no embedding",
        NO_COMPLETION,
    )
    yield "a stream's first event is an error that says no more (else as its status)", STATUSES[502]
    for words, outcome in FAILURES.values():
        yield words, outcome
    yield "`total_timeout_s` is over in the first attempt", ALL_OF_THE_TIME


# -- asking the same provider again ----------------------------------------------------------------

FIRST_PAUSE_S: Final = 0.25
LONGEST_PAUSE_S: Final = 8.0
"""Who is asked to wait longer is told so: his caller can wait better than an open connection."""


def pause_s(tries: int, retry_after_s: int | None, draw: float) -> float | None:
    """How long to wait before the same provider is asked again, after so many times that it was;
    None: it asks for more patience than is left. `draw` is uniform in [0, 1)."""
    backed_off = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0**tries)
    if retry_after_s is None:
        # Half of it is left to chance: who failed together does not come back together.
        return backed_off * (0.5 + 0.5 * draw)
    if retry_after_s > LONGEST_PAUSE_S:
        return None
    return retry_after_s + backed_off * draw / 2
