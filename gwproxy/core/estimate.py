"""How many tokens a prompt is, before it is sent: a bound for nothing, or a count for some ms.

Pure: no loop is awaited here, but a long count stops often enough for its caller to do so.
"""

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from gwproxy.core.errors import InvalidRequest
from gwproxy.core.tokens import PIECE_CHARS, pieces

IMAGE_TOKENS = 4_800
"""What an image may cost where the price book says nothing: the dearest of today's models."""

# What the chat form itself costs, as OpenAI documents it.
_MESSAGE_TOKENS = 3
_NAME_TOKENS = 1
_REPLY_TOKENS = 3


@dataclass(frozen=True, slots=True)
class Form:
    """Where the prompt is in one API's body."""

    turns: str
    """The field with the messages, or whatever they are called."""
    schemas: tuple[str, ...]
    """Fields that are read as JSON by the model."""
    parameters: frozenset[str]
    """Fields that no model reads as text. Any other might be rendered into the prompt."""
    schema_tokens: int = 16
    """For the words that a provider wraps around tools and a response format."""
    nested: bool = False
    """Parts may hold parts, at any depth."""


# fmt: off
CHAT = Form(
    "messages",
    ("tools", "functions", "response_format"),
    frozenset({
        "model", "messages", "tools", "functions", "response_format", "stream", "stream_options",
        "max_tokens", "max_completion_tokens", "n", "temperature", "top_p", "top_k", "min_p",
        "stop", "seed", "presence_penalty", "frequency_penalty", "repetition_penalty",
        "logit_bias", "logprobs", "top_logprobs", "user", "metadata", "service_tier", "store",
        "tool_choice", "function_call", "parallel_tool_calls", "reasoning", "reasoning_effort",
        "thinking", "verbosity", "modalities", "moderation", "prompt_cache_key",
        "prompt_cache_options", "prompt_cache_retention", "safety_identifier",
    }),
)
# fmt: on

_CHARS_A_TOKEN = {
    "image_url": 16,
    "input_image": 16,
    "image": 16,
    "input_audio": 16,
    "audio": 16,
    "video_url": 16,
    "input_video": 16,
    "video": 16,
    "file": 1,
    "input_file": 1,
    "document": 1,
}
"""Parts that are not text, and how many characters of their base64 are at least one token, over
and above one image. Sound at its most compressed is about 40 characters a token; a document's text
is packed to a quarter of its size, which base64 lengthens by a third."""

_URLS = frozenset({"url", "image_url", "file_url", "file_data", "data"})
_TEXTS = frozenset({"text", "content"})
_LABELS = frozenset({"type", "id", "tool_call_id", "detail", "format", "media_type"})
_LABEL_CHARS = 64
"""A label that is longer is not one, and is counted as text."""


def prompt_bound(
    body: Mapping[str, Any],
    size_bytes: int,
    image_tokens: int = IMAGE_TOKENS,
    form: Form = CHAT,
) -> int:
    """A number of tokens that the prompt cannot exceed, from the size of its JSON in bytes.

    Each token of text stands for at least one byte. What is no text in the body is added: the
    form of the chat, and images that a URL of a few bytes can stand for.
    """
    messages = body.get(form.turns)
    count = len(messages) if type(messages) is list else 0
    media = _media_within(messages) if form.nested else _media_parts(messages)
    bound = size_bytes + (_MESSAGE_TOKENS + _NAME_TOKENS) * count + _REPLY_TOKENS
    for field in form.schemas:
        if field in body:
            bound += form.schema_tokens
    return bound + image_tokens * media


def prompt_tokens(
    body: Mapping[str, Any],
    count: Callable[[str], int],
    image_tokens: int = IMAGE_TOKENS,
    form: Form = CHAT,
) -> int:
    """The prompt's tokens, counted in one go: a millisecond for each 20 KB or so."""
    steps = prompt_slices(body, count, image_tokens, form)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return int(end.value)


def prompt_slices(
    body: Mapping[str, Any],
    count: Callable[[str], int],
    image_tokens: int = IMAGE_TOKENS,
    form: Form = CHAT,
) -> Generator[None, None, int]:
    """The same count as a generator that stops after each 32 K characters and returns the sum.

    Images and other data are never tokenised: a megabyte of base64 would be 700,000 tokens that
    no provider charges.
    """
    messages = body.get(form.turns)
    media = _media_within(messages) if form.nested else _media_parts(messages)
    total = _REPLY_TOKENS + image_tokens * media
    done = 0  # what was done since the last stop, in characters or what takes as long
    for words in _prompt(body, form):
        if type(words) is int:
            total += words
            done += 8
            if done > PIECE_CHARS:
                yield
                done = 0
            continue
        for piece in pieces(str(words)):
            if done and done + len(piece) > PIECE_CHARS:
                yield
                done = 0
            total += count(piece)
            done += len(piece) + 32  # the call itself
    return total


def text_alone(body: Mapping[str, Any], form: Form = CHAT) -> bool:
    """Whether the prompt is plain messages: of anything else the count is partly a bound, which
    says nothing of how many tokens a provider makes of a text."""
    messages = body.get(form.turns)
    return (
        type(messages) is str
        or (
            type(messages) is list
            and all(type(one) is dict and type(one.get("content")) is str for one in messages)
        )
    ) and (not any(body.get(field) for field in form.schemas))


def _prompt(body: Mapping[str, Any], form: Form) -> Iterator[str | int]:
    """Everything in `body` that a model may read: texts to be counted, and tokens known already."""
    messages = body.get(form.turns)
    if type(messages) is list:
        for message in messages:
            yield _MESSAGE_TOKENS
            if type(message) is dict and message.get("name"):
                yield _NAME_TOKENS
            yield from _words(message)
    elif type(messages) is str:
        yield messages
    for field in form.schemas:
        schema = body.get(field)
        if schema:
            yield form.schema_tokens
            yield _compact(field, schema)
    for field, value in body.items():
        if value and field not in form.parameters:
            yield from _words({field: value})


def _words(root: object) -> Iterator[str | int]:
    """The strings and numbers under `root`, at any depth; data by its length."""
    stack: list[tuple[object, int, bool]] = [(root, 0, False)]
    while stack:
        node, chars_a_token, is_part = stack.pop()
        yield 0  # a step, also where nothing is found
        if type(node) is dict:
            # Only a part of a content says what it is: a message or a call that named itself an
            # image would have its words taken for data.
            if is_part and _is_media(node):
                chars_a_token = _CHARS_A_TOKEN[node["type"]]
            for name, value in node.items():
                if type(value) is not str:
                    if type(value) is list and name == "content":
                        stack.extend((part, chars_a_token, True) for part in value)
                    elif value:
                        stack.append((value, chars_a_token, False))
                elif name in _LABELS and len(value) <= _LABEL_CHARS:
                    continue
                elif chars_a_token and name not in _TEXTS:
                    yield -(-len(value) // chars_a_token)
                elif name in _URLS and value.startswith("data:"):
                    yield -(-len(value) // 16)
                else:
                    yield value
        elif type(node) is list:
            stack.extend((value, chars_a_token, False) for value in node if value)
        elif type(node) is str:
            yield -(-len(node) // chars_a_token) if chars_a_token and not is_part else node
        elif type(node) is int or type(node) is float:
            yield str(node)


def _media_parts(messages: object) -> int:
    """Parts that may each cost as much as an image: in a message, or in a tool's result there."""
    found = 0
    if type(messages) is list:
        for message in messages:
            content = message.get("content") if type(message) is dict else None
            if type(content) is list:
                for part in content:
                    if type(part) is dict:
                        found += _is_media(part)
                        inner = part.get("content")
                        if type(inner) is list:
                            found += sum(map(_is_media, inner))
    return found


def _media_within(root: object) -> int:
    """The same at any depth: all that calls itself by such a name, which some of it may not be."""
    found, stack = 0, [root]
    while stack:
        node = stack.pop()
        if type(node) is dict:
            found += _is_media(node)
            stack.extend(value for value in node.values() if type(value) in (dict, list))
        elif type(node) is list:
            stack.extend(value for value in node if type(value) in (dict, list))
    return found


def _is_media(part: object) -> bool:
    kind = part.get("type") if type(part) is dict else None
    return type(kind) is str and kind in _CHARS_A_TOKEN


def _compact(field: str, value: object) -> str:
    try:
        return orjson.dumps(value).decode()
    except TypeError:
        # Deeper than it can be written again, so that it could not be sent either.
        raise InvalidRequest(
            f"Invalid value for '{field}': it is nested too deeply.", param=field
        ) from None
