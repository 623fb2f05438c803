"""Expected refusals and failures, each with its status, its code and the words a client may read.

Raised where the reason is known, turned into a response in one place (`web.py`). The words are
public: they never hold a key, a prompt, an answer, or the text of a foreign exception.
"""

from collections.abc import Mapping
from typing import Any, ClassVar


class GatewayError(Exception):
    """A request that ends without an answer from a model.

    `status` is the HTTP status, `type` and `code` the fields of OpenAI's error envelope,
    `error_type` the closed-set label that metrics and logs carry.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None
    error_type: ClassVar[str] = "gateway_internal"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        status: int | None = None,
        type: str | None = None,
        code: str | None = None,
        error_type: str | None = None,
        retry_after_s: int | None = None,
        headers: Mapping[str, str] | None = None,
        close: bool = False,
        body: bytes | None = None,
        gateway: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if status is not None:
            self.status = status  # type: ignore[misc]
        if type is not None:
            self.type = type  # type: ignore[misc]
        if code is not None:
            self.code = code  # type: ignore[misc]
        if error_type is not None:
            self.error_type = error_type  # type: ignore[misc]
        self.retry_after_s = retry_after_s
        self.headers = dict(headers or {})
        self.close = close
        """True: the connection cannot be reused, for its framing is in doubt or its body unread."""
        self.body = body
        """An upstream's own error body in OpenAI's shape, passed on as it came."""
        self.gateway = gateway
        """The figures that explain a refusal, for programs."""

    def envelope(self) -> dict[str, Any]:
        """The error in OpenAI's shape."""
        error: dict[str, Any] = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        if self.gateway is not None:
            error["gateway"] = self.gateway
        return {"error": error}


# -- the caller's side ---------------------------------------------------------------------------


class InvalidApiKey(GatewayError):
    """Missing, malformed, unknown, revoked and expired keys all get this one answer."""

    status, type, code = 401, "invalid_request_error", "invalid_api_key"
    error_type = "caller_auth"


class AccountSuspended(GatewayError):
    status, type, code = 403, "permission_error", "account_suspended"
    error_type = "caller_auth"


class InvalidRequest(GatewayError):
    """A body or a field that cannot be served; `code` says which kind, `param` which field."""

    status, type, code = 400, "invalid_request_error", "invalid_value"
    error_type = "caller_invalid"


class ModelNotFound(GatewayError):
    """Unknown and not allowed look the same, so that nobody can probe for models."""

    status, type, code = 404, "invalid_request_error", "model_not_found"
    error_type = "policy_model"


class ModelNotPriced(GatewayError):
    """No price, no call: what cannot be priced cannot be kept within a budget."""

    status, type, code = 400, "invalid_request_error", "model_not_priced"
    error_type = "policy_model"


class NotFound(GatewayError):
    status, type, code = 404, "invalid_request_error", "not_found"
    error_type = "caller_invalid"


class MethodNotAllowed(GatewayError):
    status, type, code = 405, "invalid_request_error", "method_not_allowed"
    error_type = "caller_invalid"


class AlreadyExists(GatewayError):
    status, type, code = 409, "invalid_request_error", "already_exists"
    error_type = "caller_invalid"


class Conflict(GatewayError):
    """What is asked for cannot be, as things stand."""

    status, type, code = 409, "invalid_request_error", "conflict"
    error_type = "caller_invalid"


class PreconditionFailed(GatewayError):
    """`If-Match` names another version than there is: somebody was faster."""

    status, type, code = 412, "invalid_request_error", "precondition_failed"
    error_type = "caller_invalid"


class RateLimited(GatewayError):
    """Too many requests, tokens or open calls of one key or user. Waiting helps, money would not.

    OpenAI's SDKs make their RateLimitError of the status, and retry after `Retry-After`.
    """

    status, type, code = 429, "rate_limit_exceeded", "rate_limit_exceeded"
    error_type = "policy_rate"


class RequestTooLarge(GatewayError):
    status, type, code = 413, "invalid_request_error", "request_too_large"
    error_type = "caller_invalid"


class UnsupportedMediaType(GatewayError):
    status, type, code = 415, "invalid_request_error", "unsupported_media_type"
    error_type = "caller_invalid"


class RequestTimeout(GatewayError):
    """The caller was too slow in sending its request."""

    status, type, code = 408, "invalid_request_error", "request_timeout"
    error_type = "caller_invalid"


class BadRequest(GatewayError):
    """HTTP framing that this server does not accept; always closes the connection."""

    status, type, code = 400, "invalid_request_error", "bad_request"
    error_type = "caller_invalid"


class InsufficientQuota(GatewayError):
    """A budget does not allow it. SDKs are told not to try again: money does not come back soon."""

    status, type, code = 429, "insufficient_quota", "insufficient_quota"
    error_type = "policy_quota"

    def __init__(self, message: str, *, scope: str, **fields: Any) -> None:
        """`scope` says whose budget: `key`, `user`, `org`, `provider` or `outage`."""
        super().__init__(message, **fields)
        self.scope = scope


# -- our side ------------------------------------------------------------------------------------


class Draining(GatewayError):
    status, type, code = 503, "server_error", "draining"
    error_type = "other"


class StorageUnavailable(GatewayError):
    status, type, code = 503, "server_error", "storage_unavailable"
    error_type = "gateway_storage"


# -- the upstream's side -------------------------------------------------------------------------


class UpstreamFailed(GatewayError):
    """No provider gave an answer. `error_type` says how the last attempt failed."""

    status, type, code = 502, "server_error", "all_providers_failed"
    error_type = "provider_error"


class NoProviderAvailable(GatewayError):
    """Nobody was asked: every provider that could serve the model is being left alone."""

    status, type, code = 503, "server_error", "no_provider_available"
    error_type = "provider_overloaded"


class UpstreamMisconfigured(GatewayError):
    """The operator's fault: a bad token, a wrong prefix, no credits. Never blamed on the caller."""

    status, type, code = 502, "server_error", "upstream_misconfigured"
    error_type = "provider_auth"
