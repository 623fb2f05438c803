"""The requests and answers that every contestant carries. Pure: bytes out of values.

Shapes and sizes follow a chat completion as SDKs send it and providers answer it, because a proxy's
cost depends on both. The load generator knows the answer beforehand and compares byte by byte.
"""

import re
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
# Who writes events anew may leave the padding out, but never the text: there it is the word.
_STAMPED_WORD: Final = re.compile(rb'"content": ?" (\d{19})"')
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


def word_event(index: int, now_ns: int, *, stamped: bool = False) -> bytes:
    delta = b'{"content":"%b"}' % stamped_word(now_ns) if stamped else _WORDS[index % len(_WORDS)]
    return _CHUNK % (delta, b"null", b"null", now_ns)


def stamped_word(now_ns: int) -> bytes:
    return b" %019d" % now_ns


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
    """When the upstream sent this event, or None for an event that does not say it."""
    at = event.find(_STAMP)
    if at >= 0:
        return int(event[at + len(_STAMP) : at + len(_STAMP) + 19])
    word = _STAMPED_WORD.search(event)
    return int(word.group(1)) if word else None


def text_of(event: bytes) -> bytes:
    """The words that an event adds to the answer, however it was written anew."""
    data = event.partition(b"data:")[2].strip()
    if not data.startswith(b"{"):
        return b""
    choices = orjson.loads(data).get("choices") or [{}]
    return ((choices[0].get("delta") or {}).get("content") or "").encode()


def _meaning(answer: bytes) -> tuple[Any, ...]:
    parsed = orjson.loads(answer)
    choice, usage = parsed["choices"][0], parsed["usage"]
    counted = (usage["prompt_tokens"], usage["completion_tokens"])
    return choice["message"]["content"], choice["finish_reason"], counted


def complaint_of_bytes(body: bytes) -> str:
    """What is wrong with a non-stream answer that ought to be the upstream's to the byte."""
    return "" if body == ANSWER else "another body than the upstream's"


def complaint_of_meaning(body: bytes) -> str:
    """The same for a proxy that writes answers anew: the text, its end and its tokens count."""
    try:
        same = _meaning(body) == _meaning(ANSWER)
    except (ValueError, KeyError, IndexError, TypeError):
        same = False
    return "" if same else "another answer than the upstream's"


def complaint_of_stream(body: bytes) -> str:
    return "" if body.endswith(DONE) else "stream without [DONE]"


def request_body(model: str, *, system: str = "You answer in one sentence.", **extra: Any) -> bytes:
    """A chat request of exactly REQUEST_BYTES, `extra` fields included."""
    messages = [
        {"role": "system", "content": system},
        {"role": "user", "content": ""},
    ]
    body = {"model": model, "messages": messages, "max_completion_tokens": 4096, **extra}
    sentence = "Our invoices are due on the first working day after the month in which they come. "
    room = REQUEST_BYTES - len(orjson.dumps(body))
    messages[1]["content"] = (sentence * (room // len(sentence) + 1))[:room]
    return orjson.dumps(body)


def stream_body(
    model: str, *, stream_id: int, n_events: int, interval_ms: float, stamped: bool = False
) -> bytes:
    """A streamed chat request. Its knobs are the system message: fields that they do not know some
    proxies leave out, but what the model is told, none changes.

    It asks for the usage chunk itself, so no proxy has a reason to take one out of the stream.
    """
    return request_body(
        model,
        system=orjson.dumps(
            {
                "stream_id": stream_id,
                "n_events": n_events,
                "interval_ms": interval_ms,
                "stamped": stamped,
            }
        ).decode(),
        stream=True,
        stream_options={"include_usage": True},
    )


def knobs_of(body: bytes) -> dict[str, Any] | None:
    """What a streamed request asks of the upstream; None for one that is not streamed."""
    request = orjson.loads(body) if body else {}
    if not request.get("stream"):
        return None
    knobs: dict[str, Any] = orjson.loads(request["messages"][0]["content"])
    return knobs


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
