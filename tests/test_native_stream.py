"""What holds for the streams of both providers' own APIs alike: passed on as they came, metered
whatever the split of the bytes, and told again from a whole answer."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gwproxy.core import messages_stream, responses_stream
from gwproxy.core.errors import GatewayError
from gwproxy.core.native_stream import NativeStream
from gwproxy.core.usage import Usage
from tests import test_messages, test_responses
from tests.harness import tokenizer
from tests.scene import cut


@dataclass(frozen=True)
class Format:
    """One API's stream, the whole answer that says the same, and what both have used."""

    new: Callable[[], NativeStream]
    stream: list[bytes]
    answer: dict[str, Any]
    as_stream: Callable[[dict[str, Any]], bytes]
    words: Callable[[], int]
    usage: Usage
    unsaid: str
    """What a stream made of the whole answer has in no delta."""
    fields: str
    kinds: str


FORMATS = {
    "messages": Format(
        test_messages.new,
        test_messages.STREAM,
        test_messages.whole_answer(),
        messages_stream.as_stream,
        test_messages.words,
        Usage(10, 20, 3, 45, 0),
        "",
        "type delta usage message content_block index text error content thinking partial_json "
        "name input input_tokens output_tokens",
        "message_start content_block_start content_block_delta message_delta error x",
    ),
    "responses": Format(
        test_responses.new,
        test_responses.STREAM,
        test_responses.ANSWER,
        responses_stream.as_stream,
        test_responses.words,
        Usage(15, 10, 5, 45, 20),
        "Let me see: ",  # the summary of a thought, which comes in one piece with its item
        "type delta usage response item output content text error name",
        "response.output_text.delta response.output_item.added response.completed response.failed "
        "error x",
    ),
}
EACH = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)


@EACH
@pytest.mark.parametrize("longest", [1, 2, 7, 64, 10_000])
def test_a_stream_is_passed_on_and_metered_whatever_its_pieces(form: Format, longest: int) -> None:
    whole = b"".join(form.stream)
    stream = form.new()
    out = b"".join(stream.feed(piece) for piece in cut(whole, random.Random(longest), longest))
    assert out + stream.finish() == whole
    assert (stream.done, stream.complete, stream.committed) == (True, True, True)
    assert stream.meter.counted() == form.words()
    assert stream.meter.usage == form.usage
    assert not stream.meter.partial


@EACH
def test_events_that_come_one_by_one_are_read_alike(form: Format) -> None:
    stream = form.new()
    for each in form.stream:
        assert stream.feed(each) == each
    assert (stream.complete, stream.meter.counted()) == (True, form.words())


@EACH
def test_nothing_counts_before_the_first_word(form: Format) -> None:
    stream = form.new()
    for each in form.stream[:3]:
        stream.feed(each)
        assert not stream.committed
    stream.feed(form.stream[3])
    assert stream.committed and not stream.complete


@EACH
def test_a_whole_answer_is_metered_like_its_stream(form: Format) -> None:
    meter = form.new().meter
    meter.observe_answer(form.answer)
    assert (meter.counted(), meter.usage) == (form.words(), form.usage)


@EACH
def test_a_whole_answer_can_be_told_as_a_stream(form: Format) -> None:
    stream = form.new()
    sent = form.as_stream(form.answer)
    assert stream.feed(sent) == sent
    assert (stream.complete, stream.meter.usage) == (True, form.usage)
    assert stream.meter.counted() == form.words() - tokenizer().count(form.unsaid)


def json_of(fields: str) -> st.SearchStrategy[dict[str, Any]]:
    names = st.sampled_from(fields.split())
    value = st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4),
        max_leaves=12,
    )
    return st.dictionaries(names, value, max_size=5)


@EACH
@settings(deadline=None)
@given(data=st.data())
def test_nothing_that_may_come_makes_the_meter_raise(form: Format, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(form.kinds.split()))
    event = {**data.draw(json_of(form.fields)), "type": kind}
    stream = form.new()
    sent = b"data: %b\n\n" % orjson.dumps(event)
    assert stream.feed(sent) == sent
    assert stream.meter.counted() >= 0
    assert stream.meter.usage is None or stream.meter.usage.output >= 0
    stream.meter.observe_answer(event)
    assert stream.error_event(GatewayError("x"))
