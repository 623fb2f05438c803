"""What an upstream's answer means, and what of it a caller may read."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gwproxy.core.errors import GatewayError
from gwproxy.core.money import Picos
from gwproxy.core.outcomes import Meaning
from gwproxy.core.upstream_words import (
    Verdict,
    classify,
    classify_event,
    custom_cost,
    metadata,
    passed_on,
    to_error,
)
from gwproxy.metrics import ERROR_TYPES

AT_S = datetime(2026, 10, 21, 7, 27, 29, 500_000, tzinfo=UTC).timestamp()
TOKEN = "cf-Tok3n_abcdefghijklmnopqrstuvwxyz0123456789"
CALLER, POLICY = Meaning.CALLER_ERROR, Meaning.POLICY_BLOCK
OPERATOR, THROTTLED, FAILURE = Meaning.OPERATOR_FAULT, Meaning.THROTTLED, Meaning.UPSTREAM_FAILURE


def read(status: int, body: Any, secrets: tuple[str, ...] = (TOKEN,), **headers: str) -> Verdict:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    verdict = classify(status, headers, raw, secrets, AT_S)
    assert verdict.error_type in ERROR_TYPES
    return verdict


def told(verdict: Verdict) -> tuple[int, dict[str, Any], str]:
    """The status, the error object, and the whole text that a caller gets."""
    error = to_error(verdict)
    assert isinstance(error, GatewayError)
    text = error.body.decode() if error.body is not None else json.dumps(error.envelope())
    value = json.loads(text)["error"]
    assert {"message", "type", "param", "code"} <= value.keys()
    return error.status, value, text


def gateway(code: int, message: str = "words of the gateway", http: int = 400) -> dict[str, Any]:
    """The gateway's own envelope: its `error` is a list."""
    return {
        "success": False,
        "result": [],
        "messages": [],
        "error": [{"code": code, "message": message}],
        "name": "AiGatewayError",
        "httpCode": http,
        "internalCode": code,
        "message": message,
        "description": message,
    }


def v4(code: int, message: str = "words of the API") -> dict[str, Any]:
    """The management API's envelope, which its REST routes use as well."""
    return {
        "result": None,
        "success": False,
        "errors": [{"code": code, "message": message}],
        "messages": [],
    }


def openai(message: str = "Bad.", **fields: Any) -> dict[str, Any]:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return {"error": {**error, **fields}}


# -- the gateway's own codes ----------------------------------------------------------------------

CODES = [
    # code, HTTP status, meaning, error_type, status and code for the caller
    (2001, 400, OPERATOR, "provider_auth", 502, "upstream_misconfigured"),
    (2003, 429, THROTTLED, "provider_rate_limited", 429, "rate_limit_exceeded"),
    (2005, 400, FAILURE, "provider_error", 502, "all_providers_failed"),
    (2008, 400, OPERATOR, "provider_auth", 502, "upstream_misconfigured"),
    (2009, 401, OPERATOR, "provider_auth", 502, "upstream_misconfigured"),
    (2009, 400, OPERATOR, "provider_auth", 502, "upstream_misconfigured"),
    (2016, 424, POLICY, "other", 424, "content_blocked"),
    (2017, 424, POLICY, "other", 424, "content_blocked"),
    (2017, 422, POLICY, "other", 422, "content_blocked"),
    (2018, 429, THROTTLED, "provider_rate_limited", 429, "rate_limit_exceeded"),
    (2019, 400, OPERATOR, "provider_auth", 502, "upstream_misconfigured"),
    (2021, 402, OPERATOR, "provider_auth", 502, "upstream_misconfigured"),
    (2029, 400, POLICY, "other", 400, "content_blocked"),
    (2029, 500, POLICY, "other", 424, "content_blocked"),
    (2030, 424, POLICY, "other", 424, "content_blocked"),
    (2040, 400, OPERATOR, "provider_auth", 502, "upstream_misconfigured"),
    (2040, 403, OPERATOR, "provider_auth", 502, "upstream_misconfigured"),
    (2041, 429, THROTTLED, "provider_rate_limited", 429, "rate_limit_exceeded"),
    (2044, 400, OPERATOR, "provider_auth", 502, "upstream_misconfigured"),
    (2045, 429, THROTTLED, "provider_rate_limited", 429, "rate_limit_exceeded"),
    (7003, 404, CALLER, "caller_invalid", 404, "model_not_found"),
    (7003, 400, CALLER, "caller_invalid", 404, "model_not_found"),
    (7010, 410, CALLER, "caller_invalid", 404, "model_not_found"),
    (7013, 503, FAILURE, "provider_overloaded", 502, "all_providers_failed"),
    (9106, 400, OPERATOR, "provider_auth", 502, "upstream_misconfigured"),
    (10000, 401, OPERATOR, "provider_auth", 502, "upstream_misconfigured"),
]


@pytest.mark.parametrize("envelope", [gateway, v4], ids=["gateway", "v4"])
@pytest.mark.parametrize(("code", "http", "meaning", "error_type", "status", "public"), CODES)
def test_what_each_code_of_the_gateway_means(
    envelope: Any, code: int, http: int, meaning: Meaning, error_type: str, status: int, public: str
) -> None:
    verdict = read(http, envelope(code, "do not pass this on"))
    assert (verdict.meaning, verdict.error_type) == (meaning, error_type)
    sent_status, error, text = told(verdict)
    assert (sent_status, error["code"]) == (status, public)
    assert isinstance(error["message"], str)
    assert "do not pass this on" not in text
    if meaning is OPERATOR:
        assert "check" in verdict.hint or "gateway" in verdict.hint
        assert verdict.hint not in text


def test_only_failures_of_the_upstream_and_throttling_lead_to_another_provider() -> None:
    assert {each for each in Meaning if each.may_fall_back} == {THROTTLED, FAILURE}


@pytest.mark.parametrize(
    "body",
    [
        {"internalCode": 2005, "error": []},
        {"internalCode": 2005, "message": "x"},
        {"error": [{"code": "2005"}], "internalCode": 2005},
        {"errors": [{"code": 2005}]},
    ],
)
def test_a_code_is_found_wherever_the_envelope_has_it(body: Any) -> None:
    assert read(400, body).meaning is FAILURE


@pytest.mark.parametrize(
    ("status", "meaning"),
    [(400, CALLER), (429, THROTTLED), (401, OPERATOR), (500, FAILURE), (403, OPERATOR)],
)
def test_of_a_code_that_nobody_knows_the_status_decides_and_the_log_tells(
    status: int, meaning: Meaning
) -> None:
    for envelope in (gateway(2099), v4(2099)):
        verdict = read(status, envelope)
        assert verdict.meaning is meaning
        assert verdict.hint


def test_a_callers_mistake_under_an_unknown_code_is_told_in_its_words() -> None:
    verdict = read(400, v4(5006, "AiError: messages must not be empty"))
    status, error, _ = told(verdict)
    assert (status, error["message"]) == (400, "AiError: messages must not be empty")


# -- statuses --------------------------------------------------------------------------------------

STATUSES = [
    *((status, CALLER, status) for status in (400, 404, 405, 406, 410, 413, 415, 422, 451)),
    *((status, OPERATOR, 502) for status in (401, 402, 403)),
    *((status, THROTTLED, 429) for status in (409, 429)),
    *((status, FAILURE, 502) for status in (408, 500, 501, 502, 503, 504, 529, 599)),
    *((status, FAILURE, 502) for status in range(520, 527)),
    *((status, FAILURE, 502) for status in (300, 301, 302, 303, 304, 307, 308)),
]
PAGES = [b"", b"<html>Bad gateway</html>", b"error code: 1010", b"\xff\xfe", b"[]", b"null", b'"x"']


@pytest.mark.parametrize(("status", "meaning", "public"), STATUSES)
def test_a_providers_own_error_is_classified_by_its_status(
    status: int, meaning: Meaning, public: int
) -> None:
    verdict = read(status, openai("The provider's words."))
    assert verdict.meaning is meaning
    sent, error, text = told(verdict)
    assert sent == public
    assert ("The provider's words." in text) == (meaning is CALLER)
    assert error["code"] != "invalid_api_key"


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize(("status", "meaning", "public"), STATUSES)
def test_a_page_in_place_of_an_error_is_classified_by_its_status_and_not_passed_on(
    page: bytes, status: int, meaning: Meaning, public: int
) -> None:
    if status in (404, 405):
        meaning, public = OPERATOR, 502  # there is no such API: the address is wrong
    verdict = read(status, page)
    assert verdict.meaning is meaning
    sent, _, text = told(verdict)
    assert sent == public
    assert "html" not in text
    assert "1010" not in text


def test_an_address_without_an_api_is_the_operators_mistake() -> None:
    for body in (b"404 page not found", {"detail": "Not Found"}, b"<html>"):
        verdict = read(404, body)
        assert verdict.meaning is OPERATOR
        assert "address" in verdict.hint


def test_a_redirect_is_not_followed_and_says_so_to_the_operator() -> None:
    verdict = read(302, b"", location="https://elsewhere.example/")
    assert verdict.meaning is FAILURE
    assert "302" in verdict.hint
    assert "elsewhere" not in told(verdict)[2]


@pytest.mark.parametrize("status", range(300, 600))
def test_no_answer_of_an_upstream_becomes_a_401_403_or_success(status: int) -> None:
    for body in (*PAGES, openai(code="invalid_api_key"), gateway(2009), gateway(31337)):
        sent, error, _ = told(read(status, body))
        assert 400 <= sent < 600
        assert sent not in (401, 403)
        if sent >= 500 or sent == 429:
            assert error["type"] != "invalid_request_error"


# -- a provider's words ----------------------------------------------------------------------------


def test_a_callers_error_in_openais_shape_is_passed_on_byte_for_byte() -> None:
    raw = (
        b'{ "error" : {"code":null,"message":"caf\\u00e9","type":"x","param":"n", "more":[1.0]}}\n'
    )
    error = to_error(read(400, raw))
    assert error.body == raw
    assert (error.status, error.error_type) == (400, "caller_invalid")


@pytest.mark.parametrize(
    ("body", "message", "kind", "code"),
    [
        (  # Anthropic
            {"type": "error", "error": {"type": "invalid_request_error", "message": "n must be 1"}},
            "n must be 1",
            "invalid_request_error",
            None,
        ),
        (  # Gemini
            {"error": {"code": 400, "message": "Too long.", "status": "INVALID_ARGUMENT"}},
            "Too long.",
            "invalid_request_error",
            "INVALID_ARGUMENT",
        ),
        (  # Gemini's OpenAI layer
            [{"error": {"code": 400, "message": "Too long.", "status": "INVALID_ARGUMENT"}}],
            "Too long.",
            "invalid_request_error",
            "INVALID_ARGUMENT",
        ),
        ([openai("In a list.")], "In a list.", "invalid_request_error", None),
        ({"error": "model 'x' not found"}, "model 'x' not found", "invalid_request_error", None),
        (
            {"object": "error", "message": "Too long.", "type": "BadRequestError", "code": 400},
            "Too long.",
            "BadRequestError",
            None,
        ),
        ({"error": {"message": "m", "type": 5, "code": "c"}}, "m", "invalid_request_error", "c"),
        ({"error": {"message": 5}}, "The provider refused the request.", ..., None),
        ({"error": {}}, "The provider refused the request.", ..., None),
    ],
)
def test_a_callers_error_in_another_shape_is_put_into_openais(
    body: Any, message: str, kind: Any, code: str | None
) -> None:
    for status in (400, 404, 422):
        error = to_error(read(status, body))
        assert (error.status, error.body) == (status, None)
        assert (error.message, error.code) == (message, code)
        assert kind is ... or error.type == kind


def test_long_words_are_cut_and_a_page_of_them_is_not_passed_on() -> None:
    error = to_error(read(400, {"error": {"message": "x" * 10_000, "type": "t" * 1000}}))
    assert (len(error.message), len(error.type)) == (4096, 256)
    error = to_error(read(400, openai("x" * 100_000)))
    assert error.body is None
    assert len(error.message) < 100


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (429, openai("You exceeded your quota.", code="insufficient_quota")),
        (429, openai("You exceeded your quota.", type="insufficient_quota")),
        (403, openai("x", code="insufficient_quota")),
        (400, openai("x", code="billing_hard_limit_reached")),
        (429, openai("x", code="billing_not_active")),
        (
            400,
            {
                "type": "error",
                "error": {
                    "type": "invalid_request_error",
                    "message": "Your credit balance is too low to access the API.",
                },
            },
        ),
        (402, openai("Insufficient Balance")),
        (402, gateway(2021)),
    ],
)
def test_an_empty_account_of_the_operators_is_never_told_as_the_callers(
    status: int, body: Any
) -> None:
    verdict = read(status, body)
    assert verdict.meaning is OPERATOR
    assert "credit" in verdict.hint
    sent, error, text = told(verdict)
    assert (sent, error["code"]) == (502, "upstream_misconfigured")
    assert "quota" not in text
    assert "balance" not in text


def test_an_empty_account_with_a_429_moves_on_to_the_next_provider() -> None:
    for status, moves_on in ((429, True), (403, False), (400, False)):
        verdict = read(status, openai("x", code="insufficient_quota"))
        assert verdict.outcome.may_fall_back is moves_on
        assert verdict.meaning is OPERATOR


def test_a_key_that_google_refuses_with_a_400_is_the_operators() -> None:
    error = {
        "code": 400,
        "message": "API key not valid. Please pass a valid API key.",
        "status": "INVALID_ARGUMENT",
        "details": ["odd", {"@type": "ErrorInfo", "reason": "API_KEY_INVALID"}],
    }
    for body in ({"error": error}, [{"error": error}]):
        assert read(400, body).meaning is OPERATOR


# -- secrets ---------------------------------------------------------------------------------------


def escaped(text: str) -> str:
    return "".join(f"\\u{ord(letter):04X}" for letter in text)


def shaped(message: str) -> str:
    """An error in OpenAI's shape around a message that is already written as JSON."""
    return '{"error":{"type":"x","param":null,"code":null,"message":"' + message + '"}}'


ECHOES = [
    json.dumps(openai(f"Your header was Bearer {TOKEN}.")),
    json.dumps(openai(param=TOKEN)),
    json.dumps({**openai(), "request": {"headers": [TOKEN]}}),
    json.dumps({**openai(), TOKEN: 1}),
    shaped(f"Bearer {escaped(TOKEN)}"),
    shaped(TOKEN[:20] + escaped(TOKEN[20:])),
    shaped("b").replace("{", '{"error":"' + escaped(TOKEN) + '",', 1),  # hidden by a second key
    json.dumps(openai(json.dumps({"authorization": TOKEN}))),
    json.dumps(openai(shaped(escaped(TOKEN)))),
    json.dumps(openai(f"Bearer {TOKEN[:25]}", param=TOKEN[25:])),
    json.dumps(openai(f"Bearer {TOKEN[:20]}...")),
    json.dumps({"type": "error", "error": {"type": "t", "message": f"key {TOKEN} is bad"}}),
    json.dumps({"error": f"key {TOKEN} is bad"}),
    json.dumps(v4(5006, f"token {TOKEN}")),
    json.dumps([openai(TOKEN)]),
]


@pytest.mark.parametrize("echo", ECHOES)
@pytest.mark.parametrize("status", [400, 404, 413, 422])
def test_a_secret_that_the_upstream_echoes_reaches_nobody(echo: str, status: int) -> None:
    verdict = read(status, echo.encode())
    assert (verdict.meaning, verdict.body) == (CALLER, None)
    sent, error, text = told(verdict)
    assert sent == status
    assert error["message"] == "The provider refused the request."
    assert all(TOKEN[i : i + 12] not in text for i in range(len(TOKEN) - 11))
    assert all(TOKEN[i : i + 12] not in verdict.hint for i in range(len(TOKEN) - 11))


def test_a_token_with_characters_that_json_escapes_is_found() -> None:
    token = 'a"b\\c/d+e=f~g!h#i$j%k'
    for raw in (json.dumps(openai(token)), json.dumps(openai(token)).replace("/", "\\/")):
        assert read(400, raw.encode(), (token,)).body is None


def test_words_without_a_secret_are_passed_on_whatever_the_secrets_are() -> None:
    raw = json.dumps(openai("The model cf-Tok3n does not exist.")).encode()
    assert read(404, raw, (TOKEN,)).body == raw
    assert read(404, raw, ()).body == raw
    assert read(404, raw, ("",)).body == raw
    assert read(404, raw, ("exist",)).body is None  # a short secret counts as a whole
    assert read(404, raw, ("exists",)).body == raw


# -- retry-after -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("0", 0),
        ("30", 30),
        ("86400", 86_400),
        ("99999999", 86_400),
        ("99999999999999", 86_400),
        ("9" * 5_000, 86_400),
        ("00000000000030", 30),
        ("", None),
        ("-1", None),
        ("1.5", None),
        ("Wed, 21 Oct 2026 07:28:00 GMT", 31),
        ("Wednesday, 21-Oct-26 07:28:00 GMT", 31),
        ("Wed Oct 21 07:28:00 2026", 31),
        ("Tue, 20 Oct 2026 07:28:00 GMT", 0),
        ("Wed, 21 Oct 2099 07:28:00 GMT", 86_400),
        ("Wed, 99 Oct 2026 07:28:00 GMT", None),
        ("soon", None),
        ("\u0663\u0660", None),
        ("1e3", None),
        ("30, 30", None),
    ],
)
def test_retry_after_is_whole_seconds_or_nothing(value: str, expected: int | None) -> None:
    for body in (openai(), gateway(2003), b"slow down"):
        verdict = read(429, body, **{"retry-after": value})
        assert verdict.retry_after_s == expected
        assert to_error(verdict).retry_after_s == expected


@pytest.mark.parametrize(
    ("millis", "seconds", "expected"),
    [
        ("250", "", 1),
        ("2000", "9", 2),
        ("2001", "9", 3),
        ("99999999", "", 86_400),
        ("99999999999999", "", 86_400),
        ("soon", "9", 9),
        ("-1", "", None),
    ],
)
def test_milliseconds_say_it_more_exactly(millis: str, seconds: str, expected: int | None) -> None:
    verdict = read(429, openai(), **{"retry-after-ms": millis, "retry-after": seconds})
    assert verdict.retry_after_s == expected


@given(st.text(max_size=80))
def test_no_value_of_retry_after_is_too_strange(value: str) -> None:
    found = read(429, openai(), **{"retry-after": value}).retry_after_s
    assert found is None or 0 <= found <= 86_400


# -- errors in a stream ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "meaning"),
    [
        ({"message": "x", "code": 429}, THROTTLED),
        ({"message": "x", "code": 400}, CALLER),
        ({"message": "x", "code": 401}, OPERATOR),
        ({"message": "x", "code": 503}, FAILURE),
        ({"message": "x", "code": 200}, FAILURE),
        ({"message": "x", "code": True}, FAILURE),
        ({"message": "x", "code": "429"}, FAILURE),
        ({"message": "x"}, FAILURE),
        ({"message": "x", "type": "server_error"}, FAILURE),
        ({"message": "x", "type": "overloaded_error"}, FAILURE),
        ({"message": "x", "type": "rate_limit_error"}, THROTTLED),
        ({"message": "x", "code": "rate_limit_exceeded", "type": "requests"}, THROTTLED),
        ({"message": "x", "type": "invalid_request_error", "code": None}, CALLER),
        ({"message": "x", "code": "insufficient_quota"}, OPERATOR),
        ("x", FAILURE),
        (["x"], FAILURE),
    ],
)
def test_an_error_event_is_an_upstream_failure_unless_it_says_which(
    error: Any, meaning: Meaning
) -> None:
    assert classify_event(error).meaning is meaning


# -- what is sent ----------------------------------------------------------------------------------

IDS = st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True)


@given(IDS, IDS, IDS, IDS, st.integers(1, 99))
def test_metadata_is_five_flat_scalars(
    user: str, org: str, key: str, request: str, attempt: int
) -> None:
    raw = metadata(user, org, key, request, attempt)
    assert raw.isascii()
    assert b"\r" not in raw
    assert b"\n" not in raw
    assert json.loads(raw) == {
        "user_id": user,
        "org_id": org,
        "key_id": key,
        "request_id": request,
        "attempt": attempt,
    }


RATES = st.integers(0, 10**15).map(Picos)


@given(RATES, RATES, RATES, RATES)
def test_custom_cost_is_exact_to_the_pico_dollar(
    input_: Picos, output: Picos, read_: Picos, write: Picos
) -> None:
    raw = custom_cost(input_, output, read_, write)
    value = json.loads(raw, parse_float=lambda text: text)
    assert list(value) == [
        *("per_token_in", "per_token_out", "per_cache_read_token", "per_cache_write_token"),
    ]
    picos = [int(text.replace(".", "")) for text in value.values()]
    assert picos == [input_, output, read_, write]
    assert all(len(text.partition(".")[2]) == 12 for text in value.values())


# -- headers of an answer --------------------------------------------------------------------------


def test_of_an_answers_headers_only_those_on_the_list_are_passed_on() -> None:
    headers = {
        "x-ratelimit-remaining-tokens": "149984",
        "x-ratelimit-reset-requests": "6m0s",
        "openai-processing-ms": "12",
        "openai-version": "2020-10-01",
        "cf-aig-cache-status": "MISS",
        "retry-after": "1",
        "retry-after-ms": "100",
        "x-request-id": "req_upstream",
    }
    hidden = {
        **{"set-cookie": "a=b", "server": "cloudflare", "cf-ray": "x", "cf-aig-log-id": "01"},
        **{"content-length": "3", "transfer-encoding": "chunked", "connection": "x-ratelimit-a"},
        **{"cf-aig-authorization": "Bearer x", "authorization": "Bearer x", "location": "/"},
        **{"x-gateway-limit-usd": "1", "x-should-retry": "true", "xx-ratelimit-a": "1", "": "x"},
        **{"x-ratelimit-": "1", "x-ratelimit-a b": "1", "openai-a:b": "1", "openai-a\r\nb": "1"},
        **{
            "access-control-allow-origin": "*",
            "www-authenticate": "x",
            "x-upstream-request-id": "",
        },
    }
    expected = dict(headers)
    expected["x-upstream-request-id"] = expected.pop("x-request-id")
    assert passed_on({**hidden, **headers}) == expected
    assert passed_on(hidden) == {}


@pytest.mark.parametrize(
    "value",
    [
        "1\r\nset-cookie: a=b",
        "1\n",
        "1\r",
        "\x00",
        "1\x7f",
        "\x1b[31m",
        "a\tb",
        "caf\xe9",
        "x" * 513,
    ],
)
def test_a_value_that_could_break_our_head_is_left_out(value: str) -> None:
    for name in ("x-ratelimit-limit-requests", "openai-version", "x-request-id", "retry-after"):
        assert passed_on({name: value}) == {}


@given(
    st.dictionaries(
        st.one_of(st.text(max_size=8), st.text(max_size=8).map(lambda text: f"openai-{text}")),
        st.text(max_size=20),
    )
)
def test_whatever_comes_each_header_passed_on_is_one_line(headers: dict[str, str]) -> None:
    for name, value in passed_on(headers).items():
        line = f"{name}: {value}"
        assert line.isprintable()
        assert line.isascii()
        assert line.index(":") == len(name)
        assert " " not in name
