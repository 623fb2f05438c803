"""What the requests of all model APIs have in common, and the checks that their parsers share.

Pure. What is sent upstream is what was parsed and priced: the body is written anew from the parsed
object, so that a duplicate key or an odd encoding can hide nothing.
"""

from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, ClassVar, Final, Literal, get_args

import msgspec
import orjson

from gwproxy.core.api import Api
from gwproxy.core.errors import InvalidRequest
from gwproxy.core.estimate import CHAT, Form, prompt_bound, prompt_slices, text_alone
from gwproxy.core.meter import Meter
from gwproxy.core.routing import Candidate
from gwproxy.core.stream import EventStream
from gwproxy.core.tokens import scale

MODEL_NAME_LIMIT = 256
MAX_TOKENS_LIMIT = 10_000_000

Feature = Literal[
    "audio",
    "background",
    "cache_12h",
    "cache_1h",
    "context_management",
    "fallbacks",
    "hosted_tools",
    "inference_geo",
    "service_tier",
    "speed",
    "web_search",
]
"""What a request may ask for beyond tokens, and an organization can be allowed without a price."""

FEATURES: Final[tuple[Feature, ...]] = get_args(Feature)

FREE_TIERS = frozenset({"auto", "default", "standard_only"})

OTHERS_STATE = (
    *("previous_response_id", "conversation", "prompt", "item_reference", "file_id"),
    *("container", "thread", "thread_id"),
)
"""Fields that point at state kept upstream, where all tenants share one account."""

OTHER_PRICE = "only a cache of 5 minutes has a price"
ELSEWHERE = "it points at state outside this request"
UNBOUNDED = "its cost cannot be bounded"
UNKNOWN_LENGTH = "its length is unknown before it is fetched; send it as base64"


class ModelRequest(msgspec.Struct, frozen=True):
    """A checked request. `body` is the parsed object and is never changed in place."""

    api: ClassVar[Api]
    form: ClassVar[Form] = CHAT
    """Where the prompt is in the body."""
    meter: ClassVar[type[Meter]] = Meter
    """What reads the answer."""
    answer_bytes: ClassVar[int] = 32 * 1024 * 1024
    """The largest answer that is held as a whole; completions are a thousandth of that."""

    model: str
    stream: bool
    max_output_tokens: int | None
    """As declared, for each choice."""
    choices: int
    body: dict[str, Any]
    size_bytes: int
    """As it came or as it is sent, whichever is more."""

    @property
    def thinks(self) -> bool:
        """The caller asks for reasoning of models that do not reason unasked."""
        return False

    @property
    def header_lines(self) -> bytes:
        """Headers that the API has besides its body, ready to be sent on."""
        return b""

    @property
    def edits(self) -> tuple[str, ...]:
        """What of the caller's own words is sent otherwise, for his receipt."""
        return ()

    # -- the prompt --------------------------------------------------------------------------

    def prompt_bound(self) -> int:
        """Tokens that the prompt cannot exceed, from the size of its JSON."""
        return prompt_bound(self.body, self.size_bytes, form=self.form)

    def prompt_slices(self, count: Callable[[str], int]) -> Generator[None, None, int]:
        """Its tokens by our own tokenizer, in slices that let the loop breathe."""
        return prompt_slices(self.body, count, form=self.form)

    def prompt_tokens(self, count: Callable[[str], int]) -> int:
        """The same in one go."""
        steps = self.prompt_slices(count)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                return int(end.value)

    def held_prompt(self, counted: int, factor: int) -> int:
        """What is held for a prompt of which so many tokens were counted. `factor`, in thousandths,
        is what the model's provider makes of our count."""
        return scale(counted, factor)

    @property
    def text_alone(self) -> bool:
        """The prompt is nothing but text, so that its count says something of tokenizers."""
        return text_alone(self.body, form=self.form)

    # -- on the way --------------------------------------------------------------------------

    def body_for(self, candidate: Candidate, lowered: int | None = None) -> bytes:
        """The body for one candidate, with a maximum of output tokens where `lowered` says one."""
        changed = {**self.body, "model": candidate.native}
        if lowered is not None:
            changed[self.maximum_field(candidate)] = lowered
        return orjson.dumps(changed)

    def maximum_field(self, candidate: Candidate) -> str:
        """Where this candidate takes a maximum of output tokens."""
        raise NotImplementedError

    # -- the answer --------------------------------------------------------------------------

    def events(self, meter: Meter) -> EventStream:
        """What reads a stream in answer to this."""
        raise NotImplementedError

    def read_answer(self, body: bytes) -> Any:
        """A whole answer, parsed as far as it is looked at. A ValueError: it is none."""
        return orjson.loads(body)

    def is_answer(self, answer: Mapping[str, Any]) -> bool:
        raise NotImplementedError

    def as_stream(self, answer: Mapping[str, Any]) -> bytes:
        """A whole answer as a stream, for a client that asked for one.

        An upstream that inspects answers (Cloudflare's Guardrails) sends them whole whatever was
        asked.
        """
        raise NotImplementedError


def parse_object(raw: bytes) -> tuple[dict[str, Any], int]:
    """A JSON object in UTF-8, strictly: NaN, a byte order mark and trailing data are refused. And
    its size in bytes, as it came or as it is sent: a number such as 1e15 is longer then."""
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(
            f"The body is not valid JSON (line {error.lineno}, column {error.colno}).",
            code="invalid_json",
        ) from None
    if not isinstance(body, dict):
        raise InvalidRequest("The body must be a JSON object.", code="invalid_json")
    # Values are read up to 1,024 levels deep and written up to 254: what cannot be sent is refused
    # before anything is held for it. To write all of it costs less than to count its brackets.
    try:
        written = orjson.dumps(body)
    except orjson.JSONEncodeError:
        raise InvalidRequest("The body is nested too deeply.", code="invalid_json") from None
    return body, max(len(raw), len(written))


# -- checks --------------------------------------------------------------------------------------


def model_of(body: Mapping[str, Any]) -> str:
    model = body.get("model")
    if not isinstance(model, str):
        raise wrong("model", "must be a string", missing=model is None)
    if not model or len(model) > MODEL_NAME_LIMIT or not model.isprintable():
        raise wrong("model", f"must be 1 to {MODEL_NAME_LIMIT} printable characters")
    return model


def flag_of(body: Mapping[str, Any], name: str, param: str | None = None) -> bool:
    value = body.get(name)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise wrong(param or name, "must be true or false")


def count_of(body: Mapping[str, Any], name: str, least: int, most: int) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    # A bool is an int to Python, and a float would make the price a matter of rounding.
    if type(value) is not int or not least <= value <= most:
        raise wrong(name, f"must be an integer from {least} to {most}")
    return value


def lasts(holder: Mapping[str, Any]) -> bool:
    """It asks for a cache of an hour, whose writes cost 2 times the input; the price book's rate is
    that of 5 minutes, 1.25 times."""
    control = holder.get("cache_control")
    return isinstance(control, dict) and control.get("ttl") not in (None, "5m")


def cache_options(body: Mapping[str, Any]) -> Iterator[tuple[str, Feature]]:
    """What OpenAI's cache is asked for beyond its usual half hour: (the field, the feature).

    A comparison with an earlier response is refused: it may be another tenant's.
    """
    options = body.get("prompt_cache_options")
    if isinstance(options, dict):
        if options.get("comparison_response_id") is not None:
            raise unsupported("prompt_cache_options.comparison_response_id", ELSEWHERE)
        if options.get("ttl") not in (None, "30m"):
            yield "prompt_cache_options.ttl", "cache_12h"


def one_of(value: Any, words: frozenset[str]) -> bool:
    # A list or an object cannot be looked up in a set at all.
    return isinstance(value, str) and value in words


def wrong(param: str, what: str, *, missing: bool = False) -> InvalidRequest:
    if missing:
        return InvalidRequest(
            f"Missing required parameter: '{param}'.",
            param=param,
            code="missing_required_parameter",
        )
    return InvalidRequest(f"Invalid value for '{param}': it {what}.", param=param)


def unsupported(param: str, why: str) -> InvalidRequest:
    return InvalidRequest(
        f"'{param}' is not supported here: {why}.", param=param, code="unsupported_parameter"
    )
