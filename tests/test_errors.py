"""Every expected refusal: its status, its words, its shape."""

from typing import Any

import orjson
import pytest
from openai.types.shared import ErrorObject

from gwproxy.core import errors
from gwproxy.core.api import Api
from gwproxy.core.errors import GatewayError
from gwproxy.metrics import ERROR_TYPES
from gwproxy.web import error_response

CLASSES = sorted(
    (
        each
        for each in vars(errors).values()
        if isinstance(each, type) and issubclass(each, GatewayError)
    ),
    key=lambda each: each.__name__,
)

CALLERS = "invalid_request_error"
TABLE = {
    errors.GatewayError: (500, "server_error", None),
    errors.InvalidApiKey: (401, CALLERS, "invalid_api_key"),
    errors.RateLimited: (429, "rate_limit_exceeded", "rate_limit_exceeded"),
    errors.InsufficientQuota: (429, "insufficient_quota", "insufficient_quota"),
    errors.AccountSuspended: (403, "permission_error", "account_suspended"),
    errors.InvalidRequest: (400, CALLERS, "invalid_value"),
    errors.ModelNotFound: (404, CALLERS, "model_not_found"),
    errors.ModelNotPriced: (400, CALLERS, "model_not_priced"),
    errors.NotFound: (404, CALLERS, "not_found"),
    errors.MethodNotAllowed: (405, CALLERS, "method_not_allowed"),
    errors.AlreadyExists: (409, CALLERS, "already_exists"),
    errors.RequestTooLarge: (413, CALLERS, "request_too_large"),
    errors.UnsupportedMediaType: (415, CALLERS, "unsupported_media_type"),
    errors.RequestTimeout: (408, CALLERS, "request_timeout"),
    errors.BadRequest: (400, CALLERS, "bad_request"),
    errors.Draining: (503, "server_error", "draining"),
    errors.StorageUnavailable: (503, "server_error", "storage_unavailable"),
    errors.UpstreamFailed: (502, "server_error", "all_providers_failed"),
    errors.UpstreamMisconfigured: (502, "server_error", "upstream_misconfigured"),
}


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_each_refusal_has_its_status_its_type_and_its_code(kind: type[GatewayError]) -> None:
    more = {"scope": "user"} if kind is errors.InsufficientQuota else {}
    error = kind("Public words.", **more)
    # A class that the table does not know is of somebody's who adds it: its own line is due then.
    if kind in TABLE:
        assert (error.status, error.type, error.code) == TABLE[kind]
    assert error.error_type in ERROR_TYPES - {""}
    assert error.envelope() == {
        "error": {
            "message": "Public words.",
            "type": error.type,
            "param": None,
            "code": error.code,
        }
    }
    ErrorObject.model_validate({**error.envelope()["error"], "code": error.code}, strict=True)
    assert str(error) == "Public words."


def test_the_table_is_of_classes_that_exist() -> None:
    assert set(TABLE) <= set(CLASSES)


def test_what_differs_is_told_where_it_is_raised_and_stays_with_that_error() -> None:
    error = GatewayError(
        "Words.",
        param="model",
        status=418,
        type="t",
        code="c",
        error_type="other",
        retry_after_s=3,
        headers={"Allow": "GET"},
        close=True,
    )
    assert (error.status, error.error_type) == (418, "other")
    assert error.envelope()["error"] == {
        "message": "Words.",
        "type": "t",
        "param": "model",
        "code": "c",
    }
    assert (GatewayError.status, GatewayError("x").status) == (500, 500)
    assert GatewayError("x").headers == {}


@pytest.mark.parametrize(
    ("error", "unread", "headers"),
    [
        (errors.NotFound("x"), False, {}),
        (errors.NotFound("x"), True, {"Connection": "close"}),
        (errors.BadRequest("x", close=True), False, {"Connection": "close"}),
        (errors.Draining("x", retry_after_s=1), False, {"Retry-After": "1"}),
        (errors.Draining("x", retry_after_s=0), False, {"Retry-After": "0"}),
        (errors.MethodNotAllowed("x", headers={"Allow": "GET"}), False, {"Allow": "GET"}),
    ],
)
def test_an_error_as_a_response(error: GatewayError, unread: bool, headers: dict[str, Any]) -> None:
    response = error_response(error, "req_1", Api.CHAT, unread=unread, degraded=False)
    assert response.status == error.status
    assert isinstance(response.body, bytes)
    assert orjson.loads(response.body) == error.envelope()
    assert response.headers["x-request-id"] == "req_1"
    assert response.headers["Content-Type"] == "application/json"
    assert response.headers["Cache-Control"] == "no-store"
    assert (response.keep_alive is False) == (headers.get("Connection") == "close")
    for name in ("Retry-After", "Allow"):
        assert response.headers.get(name) == headers.get(name)


def test_an_upstreams_own_body_is_sent_as_it_came() -> None:
    raw = b'{ "error": {"message":"m", "type":"t","param":null,"code":null} }'
    response = error_response(
        GatewayError("m", status=400, body=raw), "req_1", Api.CHAT, unread=False, degraded=False
    )
    assert response.body == raw
