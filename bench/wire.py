"""The requests and answers that every contestant carries. Pure: bytes out of values.

Shapes and sizes follow a chat completion as SDKs send it and providers answer it, because a proxy's
cost depends on both. The load generator knows the answer beforehand and compares byte by byte.
"""

from typing import Any, Final

import orjson

PATH: Final = "/v1/chat/completions"
REQUEST_BYTES: Final = 2048

ANSWER: Final = orjson.dumps(
    {
        "id": "chatcmpl-CkV0mT3n7Qw9Zs1Yp4Rb8XcLd2Hf",
        "object": "chat.completion",
        "created": 1763712000,
        "model": "gpt-4o-mini-2024-07-18",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "The invoice is due on the first working day of the month "
                    "that follows the one in which it came.",
                    "refusal": None,
                    "annotations": [],
                },
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 402,
            "completion_tokens": 10,
            "total_tokens": 412,
            "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
        },
        "system_fingerprint": "fp_b547601dbd",
    }
)

# The last field of a chunk is padding that providers add against traffic analysis. Here it carries
# the moment of sending, in nanoseconds of the clock that all processes of one machine share, so
# that the far end knows how long this very event took.
_CHUNK: Final = (
    b'data: {"id":"chatcmpl-CkV0mT3n7Qw9Zs1Yp4Rb8XcLd2Hf","object":"chat.completion.chunk",'
    b'"created":1763712000,"model":"gpt-4o-mini-2024-07-18","service_tier":"default",'
    b'"system_fingerprint":null,"choices":[{"index":0,"delta":%b,"logprobs":null,'
    b'"finish_reason":%b}],"usage":%b,"obfuscation":"%019d"}\n\n'
)
_STAMP: Final = b'"obfuscation":"'
_WORDS: Final = tuple(
    orjson.dumps({"content": " " + word})
    for word in ("Every", "word", "of", "this", "answer", "passes", "the", "proxy", "once", ".")
)
DONE: Final = b"data: [DONE]\n\n"
CLOSING_EVENTS: Final = 3
"""After the words: the finish reason, the usage, and [DONE]."""


def events_total(n_words: int) -> int:
    """Events of a whole stream of that many words: the role opens it."""
    return 1 + n_words + CLOSING_EVENTS


def role_event(now_ns: int) -> bytes:
    return _CHUNK % (b'{"role":"assistant","content":"","refusal":null}', b"null", b"null", now_ns)


def word_event(index: int, now_ns: int) -> bytes:
    return _CHUNK % (_WORDS[index % len(_WORDS)], b"null", b"null", now_ns)


def finish_event(now_ns: int) -> bytes:
    return _CHUNK % (b"{}", b'"stop"', b"null", now_ns)


def usage_event(n_words: int) -> bytes:
    usage = {"prompt_tokens": 402, "completion_tokens": n_words, "total_tokens": 402 + n_words}
    chunk = {
        "id": "chatcmpl-CkV0mT3n7Qw9Zs1Yp4Rb8XcLd2Hf",
        "object": "chat.completion.chunk",
        "created": 1763712000,
        "model": "gpt-4o-mini-2024-07-18",
        "choices": [],
        "usage": usage,
    }
    return b"data: " + orjson.dumps(chunk) + b"\n\n"


def stamp(event: bytes) -> int | None:
    """When the upstream sent this event, or None for an event without the padding field."""
    at = event.find(_STAMP)
    return int(event[at + len(_STAMP) : at + len(_STAMP) + 19]) if at >= 0 else None


def request_body(model: str, **extra: Any) -> bytes:
    """A chat request of exactly REQUEST_BYTES, `extra` fields (the upstream's knobs) included."""
    messages = [
        {"role": "system", "content": "You answer in one sentence, from the text alone."},
        {"role": "user", "content": ""},
    ]
    body = {"model": model, "messages": messages, "max_completion_tokens": 4096, **extra}
    sentence = "Our invoices are due on the first working day after the month in which they come. "
    room = REQUEST_BYTES - len(orjson.dumps(body))
    messages[1]["content"] = (sentence * (room // len(sentence) + 1))[:room]
    return orjson.dumps(body)


def stream_body(model: str, *, stream_id: int, n_events: int, interval_ms: float) -> bytes:
    """A streamed chat request: the knobs ride as unknown fields, which a proxy passes on.

    It asks for the usage chunk itself, so no proxy has a reason to take one out of the stream.
    """
    return request_body(
        model,
        stream=True,
        stream_options={"include_usage": True},
        stream_id=stream_id,
        n_events=n_events,
        interval_ms=interval_ms,
    )


def request_bytes(host: str, headers: dict[str, str], body: bytes) -> bytes:
    lines = [
        f"POST {PATH} HTTP/1.1",
        f"Host: {host}",
        "Accept: application/json",
        "User-Agent: OpenAI/Python",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body
