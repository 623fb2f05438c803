"""What Cloudflare's refusals mean to an operator, and what to do about each: tables of words, and
the commands that show the same to whoever wants to see for himself. Pure; a token is never shown.
"""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson

TOKENS_PAGE: Final = "https://dash.cloudflare.com/profile/api-tokens"

_MADE_TOKEN: Final = (
    f"make a token at {TOKENS_PAGE} with the permissions AI Gateway Run, Read and Edit for this "
    "account, and set the variable that holds it"
)


@dataclass(frozen=True, slots=True)
class Fault:
    """An answer that is no success: what it means, and the cure."""

    status: int
    """0: there was no answer."""
    code: int | None
    cause: str
    cure: str
    passing: bool = False
    """It may be gone at the next try."""

    def __str__(self) -> str:
        return f"{self.cause}; {self.cure}"


_CODES: Final[Mapping[int, tuple[str, str]]] = {
    2001: (
        "there is no gateway of this name",
        "check CLOUDFLARE_GATEWAY_ID, or make it: gwproxy cloudflare setup",
    ),
    2003: (
        "the gateway is limiting requests",
        "raise its rate limit: gwproxy cloudflare gateways update ID --rate-limit 1000/60, or off",
    ),
    2005: (
        "the gateway got no answer from the provider",
        "try again; look at the provider's status",
    ),
    2008: (
        "the gateway does not know this provider prefix",
        'correct `prefix` of the provider in config.toml, as in "google-ai-studio"',
    ),
    2009: (
        "the gateway refused the token",
        f"check that it has the permission AI Gateway Run for this account, at {TOKENS_PAGE}",
    ),
    2018: (
        "the account's shared credit is limited to 200 requests a minute",
        "store the provider's key instead: gwproxy cloudflare keys store PROVIDER",
    ),
    2019: ("the gateway did not understand the model's name", "correct `prefix` of the provider"),
    2021: (
        "no key is stored for this provider, and the account has no credit to pay with instead",
        "store the provider's key: gwproxy cloudflare keys store PROVIDER",
    ),
    2040: (
        "the gateway could not resolve the stored key's alias or the model",
        "store the key under the alias `default`: gwproxy cloudflare keys store PROVIDER; check "
        "the model's name",
    ),
    2041: ("a spend limit of the gateway is used up", "raise it in the gateway's settings"),
    2044: (
        "the gateway wants a key of yours for this provider and has none",
        "store it: gwproxy cloudflare keys store PROVIDER",
    ),
    2045: ("a spend limit of the gateway is used up", "raise it in the gateway's settings"),
    7001: ("Cloudflare did not accept a value", "correct what its words name"),
    7002: ("there is nothing of this name", "list what there is: gwproxy cloudflare gateways list"),
    7003: ("Cloudflare does not know this path", "check CLOUDFLARE_ACCOUNT_ID"),
    9106: ("the token is malformed", f"copy it again, whole, from {TOKENS_PAGE}"),
    10000: ("Cloudflare does not know the token", _MADE_TOKEN),
}
REJECTED_TOKEN: Final = frozenset({9106, 10000})
"""Codes that are about the token itself."""
_NO_PERMISSION: Final = (
    "the token is valid, but may not do this, or belongs to another account",
    f"add the permission to it at {TOKENS_PAGE} (AI Gateway Read to look, AI Gateway Edit to "
    "change), and check CLOUDFLARE_ACCOUNT_ID",
)
_MOST_WORDS: Final = 200
_SECRET: Final = re.compile(r"\b(?:sk|pk|gsk|xai|AIza)[-_]?[\w*.-]{8,}|\S*\*{3}\S*|\w{32,}")
"""What may be a key, or a part of one, in words that a provider wrote about it."""


def explain(status: int, body: bytes, *, direct: bool = False) -> Fault:
    """What an error answer means, whatever it is written in. `direct`: the provider was asked by
    itself, and nothing of it is Cloudflare's."""
    try:
        value: Any = orjson.loads(body)
    except orjson.JSONDecodeError:
        value = None
    words = _provider_words(value)
    if direct or words is not None:
        return _provider_refused(status, words or "", direct=direct)
    code, said = _said(value)
    passing = status == 429 or status >= 500
    if status == 403 and code in (10000, None) and isinstance(value, dict):
        return Fault(status, code, *_NO_PERMISSION)
    if status == 403 and b"error code: 1010" in body:
        return Fault(
            status,
            1010,
            "Cloudflare's edge took this machine for a bot and let nothing through",
            "try from another network; where that helps, ask Cloudflare's support with the ray id",
        )
    if code is not None and code in _CODES:
        cause, cure = _CODES[code]
        return Fault(status, code, f"{cause} ({said})" if code == 7001 else cause, cure, passing)
    if status == 401:
        return Fault(status, code, *_CODES[10000])
    if status == 404:
        return Fault(status, code, "there is nothing at this address", "check account and gateway")
    if status == 429:
        return Fault(
            status, code, "too many requests in a short time", "wait some minutes", passing=True
        )
    if status >= 500:
        cause = f"Cloudflare's side failed (status {status})"
        return Fault(status, code, cause, "try again; see https://www.cloudflarestatus.com", True)
    cause = f"the answer was {status}" + (f": {said}" if said else "")
    return Fault(status, code, cause, "run the command below and read the answer")


def _provider_words(value: Any) -> str | None:
    """What a provider says in its own envelope, whose error is an object; None: it is not one."""
    if isinstance(value, list) and value:
        value = value[0]  # as Google writes it
    if not isinstance(value, dict) or not isinstance(error := value.get("error"), dict):
        return None
    return _SECRET.sub("...", _short(error.get("message")))


def _provider_refused(status: int, words: str, *, direct: bool) -> Fault:
    cause = f"the provider refused (status {status})" + (f": {words}" if words else "")
    key = (
        "its `token` and `base_url` in config.toml"
        if direct
        else "its stored key: gwproxy cloudflare keys list; where it is wrong, put another in its "
        "place: gwproxy cloudflare rotate PROVIDER"
    )
    if status == 429 or status >= 500:
        cure = "try again; look at the provider's status, and at what its account has left"
        return Fault(status, None, cause, cure, passing=True)
    if status in (401, 402, 403):
        return Fault(status, None, cause, f"check {key}")
    return Fault(status, None, cause, f"check its `model` in config.toml, then {key}")


def _said(value: Any) -> tuple[int | None, str]:
    """The first code and its words, in either of Cloudflare's envelopes."""
    if not isinstance(value, dict):
        return None, ""
    for name in ("errors", "error"):
        errors = value.get(name)
        if isinstance(errors, list) and errors and isinstance(errors[0], dict):
            code = errors[0].get("code")
            return (code if type(code) is int else None), _short(errors[0].get("message"))
    return None, ""


def _short(words: Any) -> str:
    if not isinstance(words, str):
        return ""
    plain = " ".join(words.split())
    return plain if len(plain) <= _MOST_WORDS else plain[: _MOST_WORDS - 3] + "..."


def curl(
    method: str, url: str, headers: Mapping[str, str], body: object = None, *, stream: bool = False
) -> str:
    """The command that does the same. A header's value may name a variable: `$TOKEN`."""
    words = ["curl", "-sS" if not stream else "-sSN"]
    if method != "GET" and not (method == "POST" and body is not None):
        words += ["-X", method]
    words.append(shlex.quote(url))
    for name, value in headers.items():
        # In double quotes, so that the shell puts the variable's value in.
        words += ["-H", f'"{name}: {value}"']
    if body is not None:
        words += ["-H", '"Content-Type: application/json"']
        words += ["-d", shlex.quote(orjson.dumps(body).decode())]
    return " ".join(words)
