"""What happened to one request, gathered while it happens: the log line and the metrics read it.

Ids, numbers and words of ours only: never a key, a prompt, an answer.
"""

import functools

import orjson

from gwproxy.core.identity import Principal


class Attempt:
    """One try at one provider, as the log shows it."""

    __slots__ = ("cost", "duration_s", "error_type", "model", "provider", "reason", "status")

    def __init__(self, provider: str, model: str) -> None:
        self.provider = provider
        self.model = model
        self.status: int | None = None
        self.error_type = ""
        self.reason = ""
        self.duration_s = 0.0
        self.cost = 0
        """What it may have cost, in nano-USD."""

    def json(self) -> str:
        status = "null" if self.status is None else self.status
        reason = f',"reason":"{self.reason}"' if self.reason else ""
        return (
            f'{{"provider":"{self.provider}","model":{_quoted(self.model)},"status":{status},'
            f'"duration_ms":{self.duration_s * 1000:.2f}{reason}}}'
        )


class Trace:
    """One request. Times are monotonic seconds.

    The values below are what holds until it is known better; set once each on the way.
    """

    principal: Principal | None = None
    model: str = ""
    """As the caller named it, once it was resolved to candidates."""
    stream: bool = False
    provider: str = ""
    provider_model: str = ""
    sent_at: float = 0.0
    first_byte_at: float = 0.0
    ended_at: float = 0.0
    status: int = 0
    error_type: str = ""
    error_code: str | None = None
    outcome: str = ""
    source: str = ""
    tokens: tuple[int, int, int, int, int] | None = None
    """Input, cache reads, cache writes, output, and the reasoning that is part of the output."""
    cost_nanos: int | None = None
    price_version: str = ""
    log_id: str = ""
    """The upstream's own id of its log record, known as soon as its head is."""

    def __init__(self, request_id: str, started: float) -> None:
        self.request_id = request_id
        self.started = started
        self.route = "other"
        self.attempts: list[Attempt] = []

    def json(self) -> str:
        """The members of the log line, as JSON without its braces.

        Written by hand, because it is written for each request: a third of what building a dict
        and serialising that costs. Ids, routes and providers' names are of grammars that need no
        escaping; what a caller or an upstream has a say in is quoted.
        """
        parts = [
            f'"request_id":"{self.request_id}","route":"{self.route}","status":{self.status},'
            f'"duration_ms":{(self.ended_at - self.started) * 1000:.2f}'
        ]
        principal = self.principal
        if principal is not None:
            parts.append(
                f'"user_id":"{principal.user_id}","org_id":"{principal.org_id}",'
                f'"key_id":"{principal.key_id}"'
            )
        if self.model:
            attempts = ",".join([attempt.json() for attempt in self.attempts])
            stream = "true" if self.stream else "false"
            parts.append(f'"model":{_quoted(self.model)},"stream":{stream},"attempts":[{attempts}]')
        if self.provider:
            parts.append(f'"provider":"{self.provider}"')
        if self.first_byte_at:
            parts.append(
                f'"gateway_ms":{(self.sent_at - self.started) * 1000:.2f},'
                f'"upstream_ms":{(self.first_byte_at - self.sent_at) * 1000:.2f}'
            )
        if self.outcome:
            source = f'"{self.source}"' if self.source else "null"
            parts.append(
                f'"outcome":"{self.outcome}","cost_nanos":{self.cost_nanos},"source":{source},'
                f'"price_version":{_quoted(self.price_version)}'
            )
        if self.tokens is not None:
            fresh, read, write, output, reasoning = self.tokens
            parts.append(
                f'"tokens":{{"input":{fresh},"cache_read":{read},"cache_write":{write},'
                f'"output":{output},"reasoning":{reasoning}}}'
            )
        if self.log_id:
            parts.append(f'"cf_aig_log_id":{orjson.dumps(self.log_id).decode()}')
        if self.error_type:
            code = "null" if self.error_code is None else _quoted(self.error_code)
            parts.append(f'"error_type":"{self.error_type}","error_code":{code}')
        return ",".join(parts)


@functools.lru_cache(maxsize=1024)
def _quoted(text: str) -> str:
    """A JSON string; the names in use are few."""
    return orjson.dumps(text).decode()
