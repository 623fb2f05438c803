"""A body is refused with a 400 in plain words, or it is understood, and then what is sent upstream
is what was understood: the same values under the same names, each name once, the model and what is
documented aside, and no prompt is more tokens than its bound."""

import json
from typing import Any

import orjson

from gwproxy import assets
from gwproxy.core.chat import ChatRequest
from gwproxy.core.embeddings import EmbeddingsRequest
from gwproxy.core.errors import GatewayError
from gwproxy.core.messages import MessagesRequest
from gwproxy.core.request import ModelRequest
from gwproxy.core.responses import ResponsesRequest
from gwproxy.core.routing import Provider, candidate_of
from gwproxy.core.tokens import choose_counter

_APIS: list[type[Any]] = [ChatRequest, EmbeddingsRequest, ResponsesRequest, MessagesRequest]
_CHANGED = frozenset({"model", "stream_options", "store"})
_BODIES = [
    b'{"model":"a/b","messages":[{"role":"user","content":"hi"}],"stream":true,"max_tokens":9}',
    b'{"model":"a","input":["x","y"],"encoding_format":"base64"}',
    b'{"model":"a","input":[{"role":"user","content":[{"type":"input_text","text":"x"}]}]}',
    b'{"model":"a","max_tokens":5,"system":"s","messages":[{"role":"user","content":"x"}]}',
    b'{"model":"a","model":"b","n":2,"messages":[{"content":[{"type":"image_url","image_url":'
    b'{"url":"data:x"}}]}],"tools":[{"type":"function","x":[1e15,-0.0,1e-7]}],"stop":null}',
]
SEEDS = [bytes([api]) + body for api in range(4) for body in _BODIES]
_count = choose_counter(assets.ranks()).count


def check(data: bytes) -> None:
    api = _APIS[data[0] % len(_APIS)] if data else ChatRequest
    raw = data[1:]
    try:
        request: ModelRequest = api.parse(raw)
        bound, counted = request.prompt_bound(), request.prompt_tokens(_count)
    except GatewayError as error:
        assert error.status == 400, error.status
        assert error.message.isascii() and len(error.message) < 400, error.message
        return
    assert counted <= bound, (counted, bound)
    sent = request.body_for(candidate_of(Provider("p", "", "p"), request.model))
    names = json.loads(sent, object_pairs_hook=once)
    assert names["model"] == request.model
    read, again = orjson.loads(raw), orjson.loads(sent)
    for name in (read.keys() | again.keys()) - _CHANGED:
        assert repr(read[name]) == repr(again[name]), name


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    assert len(value) == len(pairs), "a name stands twice in what is sent"
    return value
