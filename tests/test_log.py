"""The log: one line of JSON each, whatever is in it, and never in anybody's way."""

import asyncio
import io
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gwproxy import log as log_module
from gwproxy.core.identity import Principal
from gwproxy.core.trace import Attempt, Trace
from gwproxy.log import LEVELS, Descriptor, ForeignRecords, Log, Torn, capture_libraries, render

SECRET = "gw_live_a-key-or-a-prompt"


class Stuck(io.StringIO):
    """A reader that takes nothing until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = threading.Event()
        self.free = threading.Event()

    def write(self, text: str) -> int:
        self.entered.set()
        self.free.wait(10)
        return super().write(text)


class Gone(io.StringIO):
    """A reader that has hung up, and comes back."""

    def __init__(self) -> None:
        super().__init__()
        self.broken = True
        self.tried = threading.Event()

    def write(self, text: str) -> int:
        if self.broken:
            self.tried.set()
            raise BrokenPipeError
        return super().write(text)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    text = stream.getvalue()
    assert not text or text.endswith("\n")
    return [json.loads(line) for line in text.split("\n")[:-1]]


def written(level: str, *events: tuple[str, str]) -> list[str]:
    stream = io.StringIO()
    log = Log(stream, level)
    log.start()
    for each, event in events:
        log.event(each, event)
    log.stop()
    return [line["event"] for line in lines(stream)]


# -- lines -----------------------------------------------------------------------------------------


def test_a_line_is_an_object_with_its_time_its_level_and_its_event_first() -> None:
    line = render(1767225600.0625, "info", "request", {"status": 200, "tokens": {"input": 1}})
    assert line == (
        '{"time":"2026-01-01T00:00:00.062Z","level":"info","event":"request",'
        '"status":200,"tokens":{"input":1}}\n'
    )
    assert datetime.fromisoformat(json.loads(line)["time"]).tzinfo is not None


@given(st.text(st.characters(exclude_categories=["Cs"])), st.floats(0, 4e9))
def test_foreign_text_cannot_forge_a_line(text: str, time_s: float) -> None:
    line = render(time_s, "info", "request", {"model": text, text: [text]})
    assert line.count("\n") == 1
    assert line.endswith("\n")
    assert len(line.encode().splitlines()) == 1
    value = json.loads(line)
    if text not in ("time", "level", "event", "model"):
        assert (value["model"], value[text]) == (text, [text])


@pytest.mark.parametrize("threshold", LEVELS)
def test_what_is_below_the_threshold_is_not_written(threshold: str) -> None:
    names = list(LEVELS)
    kept = names[names.index(threshold) :]
    assert written(threshold, *((each, each) for each in names)) == kept
    assert Log(io.StringIO(), threshold).debugging == (threshold == "debug")


def test_an_unknown_level_is_a_mistake_of_the_code() -> None:
    with pytest.raises(KeyError):
        Log(io.StringIO()).event("fatal", "x")


@pytest.mark.parametrize(
    "fields",
    [{"text": "half a pair: \ud800"}, {"number": 2**70}],
    ids=["surrogate", "number"],
)
def test_a_line_that_cannot_be_written_troubles_neither_its_writer_nor_the_others(
    fields: dict[str, Any],
) -> None:
    stream = io.StringIO()
    log = Log(stream)
    log.start()
    log.event("info", "before")
    log.event("info", "odd", **fields)
    log.event("info", "after")
    log.stop()
    events = [line["event"] for line in lines(stream)]
    assert events[0] == "before"
    assert events[-1] == "after"


# -- the line of a request -------------------------------------------------------------------------

WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


def request_lines(trace: Trace, level: str = "info") -> list[dict[str, Any]]:
    stream = io.StringIO()
    log = Log(stream, level)
    log.start()
    log.members("request", trace.json())
    log.stop()
    return lines(stream)


@given(WORDS, WORDS, WORDS, WORDS)
def test_what_a_caller_or_an_upstream_said_cannot_forge_a_requests_line(
    model: str, theirs: str, log_id: str, code: str
) -> None:
    trace = Trace("req_1", 1.0)
    trace.model, trace.provider_model, trace.log_id = model, theirs, log_id
    trace.error_type, trace.error_code = "caller_invalid", code
    trace.attempts.append(Attempt("openai", theirs))
    text = trace.json()
    assert "\n" not in text
    assert "\r" not in text
    line = json.loads("{" + text + "}")
    assert (line["model"], line["cf_aig_log_id"], line["error_code"]) == (model, log_id, code)
    assert line["attempts"][0]["model"] == theirs


def test_the_line_of_a_request_says_all_that_is_known_of_it() -> None:
    trace = Trace("req_1", 10.0)
    trace.route, trace.model, trace.stream = "chat", "auto", True
    trace.principal = Principal("key_1", "alice", "acme", None, None)
    first, second = Attempt("gemini", "gemini-2.5-pro"), Attempt("openai", "gpt-4o")
    first.status, first.reason, first.duration_s = 503, "status_503", 0.5
    second.status, second.duration_s = 200, 1.25
    trace.attempts += [first, second]
    trace.provider, trace.provider_model = "openai", "gpt-4o"
    trace.gateway_s, trace.began_at = 0.25, 10.75
    trace.first_byte_at, trace.ended_at = 11.0, 12.0
    trace.status, trace.outcome, trace.source = 200, "completed", "provider"
    trace.tokens, trace.cost_nanos, trace.price_version = (5, 1, 2, 7, 3), 12_345, "2026-11"
    trace.log_id = "01JX"
    (line,) = request_lines(trace)
    assert datetime.fromisoformat(line.pop("time"))
    assert line == {
        **{"level": "info", "event": "request", "request_id": "req_1", "route": "chat"},
        **{"status": 200, "duration_ms": 2000.0, "gateway_ms": 250.0, "upstream_ms": 250.0},
        **{"user_id": "alice", "org_id": "acme", "key_id": "key_1", "model": "auto"},
        **{"stream": True, "provider": "openai", "cf_aig_log_id": "01JX"},
        "attempts": [
            {
                **{"provider": "gemini", "model": "gemini-2.5-pro", "status": 503},
                **{"duration_ms": 500.0, "reason": "status_503"},
            },
            {"provider": "openai", "model": "gpt-4o", "status": 200, "duration_ms": 1250.0},
        ],
        "tokens": {"input": 5, "cache_read": 1, "cache_write": 2, "output": 7, "reasoning": 3},
        **{"outcome": "completed", "cost_nanos": 12_345, "source": "provider"},
        "price_version": "2026-11",
    }


def test_an_outcome_without_a_source_and_an_error_without_a_code_say_null() -> None:
    trace = Trace("req_1", 1.0)
    trace.outcome, trace.cost_nanos, trace.error_type = "failed", 0, "provider_connect"
    trace.model = "auto"
    trace.attempts.append(Attempt("openai", "gpt-4o"))
    (line,) = request_lines(trace)
    assert (line["source"], line["cost_nanos"], line["error_code"]) == (None, 0, None)
    assert line["attempts"][0]["status"] is None
    assert not {"tokens", "gateway_ms", "user_id", "provider"} & line.keys()


def test_the_line_of_a_request_of_which_nothing_is_known() -> None:
    (line,) = request_lines(Trace("req_1", 1.0))
    assert (line["event"], line["route"], line["status"]) == ("request", "other", 0)
    assert request_lines(Trace("req_1", 1.0), "warning") == []


# -- a reader that is slow, or gone ----------------------------------------------------------------


def test_a_reader_that_stands_still_holds_up_nobody_and_costs_counted_lines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(log_module, "BACKLOG_LIMIT", 100)
    stream = Stuck()
    log = Log(stream)
    log.start()
    log.event("info", "first")
    assert stream.entered.wait(5)
    slowest = 0.0
    for number in range(1000):
        began = time.perf_counter()
        log.event("info", "line", number=number)
        slowest = max(slowest, time.perf_counter() - began)
    assert slowest < 1
    assert len(log._lines) == 100
    stream.free.set()
    log.stop()
    found = lines(stream)
    assert [line["event"] for line in found[:101]] == ["first"] + ["line"] * 100
    assert [line["number"] for line in found[1:101]] == list(range(100))
    dropped = [line for line in found if line["event"] == "log lines dropped"]
    assert (sum(line["count"] for line in dropped), dropped[0]["level"]) == (900, "warning")


def test_a_stop_waits_a_second_at_most_for_a_reader_that_stands_still() -> None:
    stream = Stuck()
    log = Log(stream)
    log.start()
    log.event("info", "x")
    assert stream.entered.wait(5)
    began = time.monotonic()
    log.stop()
    assert time.monotonic() - began < 3
    stream.free.set()


def test_lines_that_nobody_took_are_counted_once_somebody_reads_again() -> None:
    stream = Gone()
    log = Log(stream)
    log.start()
    for _ in range(7):
        log.event("info", "lost")
    assert stream.tried.wait(5)
    stream.broken = False
    log.event("info", "kept")
    log.stop()
    found = lines(stream)
    kept = sum(line["event"] in ("kept", "lost") for line in found)
    dropped = sum(line["count"] for line in found if line["event"] == "log lines dropped")
    assert any(line["event"] == "kept" for line in found)
    assert dropped >= 1
    assert kept + dropped == 8


def test_a_stop_writes_all_that_was_queued_in_order() -> None:
    stream = io.StringIO()
    log = Log(stream)
    log.start()
    for number in range(1234):
        log.event("info", "line", number=number)
    log.stop()
    assert [line["number"] for line in lines(stream)] == list(range(1234))


def test_lines_come_while_the_process_lives_and_not_only_at_its_end() -> None:
    class Telling(io.StringIO):
        came = threading.Event()

        def flush(self) -> None:
            self.came.set()

    stream = Telling()
    log = Log(stream)
    log.start()
    log.event("info", "x")
    assert stream.came.wait(5)
    assert lines(stream)[0]["event"] == "x"
    log.stop()


# -- what is written to a descriptor --


def test_a_pipe_that_is_full_tears_one_line_at_most_and_counts_the_others() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    sink = Descriptor(writing)
    lost = 0
    for first in range(0, 3_000, 100):  # about 300 KB, into a pipe of 64
        try:
            sink.write("".join(f"{number:099d}\n" for number in range(first, first + 100)))
        except Torn as torn:
            lost += torn.lines
    got = read_all(reading)
    sink.write("after\n")
    got += read_all(reading)
    os.close(reading)
    os.close(writing)
    *rows, after, last = got.decode().split("\n")
    assert (after, last) == ("after", "")
    whole = [int(row) for row in rows if len(row) == 99]
    assert len(rows) - len(whole) <= 1
    assert len(whole) + lost == 3_000
    assert lost > 1_000
    assert whole == list(range(len(whole)))


def test_a_disk_that_is_full_loses_lines_and_counts_each_once() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    log = Log(Descriptor(full))
    log.start()
    for _ in range(7):
        log.event("info", "lost")
    log.stop()
    os.close(full)
    assert log.dropped == 7


def read_all(fd: int) -> bytes:
    os.set_blocking(fd, False)
    got = b""
    try:
        while part := os.read(fd, 1 << 16):
            got += part
    except BlockingIOError:
        pass
    return got


# -- libraries -------------------------------------------------------------------------------------


@pytest.fixture
def foreign() -> Iterator[tuple[logging.Logger, io.StringIO, Log]]:
    """A library's logger whose records go into a log of ours."""
    stream = io.StringIO()
    log = Log(stream, "debug")
    logger = logging.Logger("library")
    logger.addHandler(ForeignRecords(log))
    log.start()
    yield logger, stream, log
    log.stop()


def test_of_a_librarys_record_its_arguments_and_its_exceptions_words_are_left_out(
    foreign: tuple[logging.Logger, io.StringIO, Log],
) -> None:
    logger, stream, log = foreign
    try:
        raise ValueError(SECRET)
    except ValueError:
        logger.exception("Error handling request from %s: %r", SECRET, {"key": SECRET})
    logger.warning("odd: %(key)s", {"key": SECRET})
    logger.warning(ValueError(SECRET))
    logger.info("not worth a line")
    log.stop()
    assert SECRET not in stream.getvalue()
    first, second, third = lines(stream)
    assert (first["event"], first["level"]) == ("library message", "error")
    assert (first["logger"], first["exception"]) == ("library", "ValueError")
    assert first["where"].startswith("test_log:")
    assert (second["level"], second["exception"]) == ("warning", None)
    assert third["event"] == "library message"


def test_a_message_that_a_library_put_together_itself_is_left_out(
    foreign: tuple[logging.Logger, io.StringIO, Log],
) -> None:
    logger, stream, log = foreign
    logger.error(f"could not read {SECRET}")
    logger.error("could not read " + SECRET + " at %d", 7)
    log.stop()
    assert len(lines(stream)) == 2
    assert SECRET not in stream.getvalue()


@pytest.fixture
def captured() -> Iterator[tuple[io.StringIO, Log]]:
    """The process's own logging, captured as `serve` does it, and put back."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    stream = io.StringIO()
    log = Log(stream)
    capture_libraries(log)
    log.start()
    yield stream, log
    log.stop()
    root.handlers[:], level = before
    root.setLevel(level)


async def test_what_the_event_loop_says_of_a_lost_exception_holds_nothing_of_a_request(
    captured: tuple[io.StringIO, Log],
) -> None:
    stream, log = captured

    class Request:
        def __repr__(self) -> str:
            return f"<Request {SECRET}>"

    loop = asyncio.get_running_loop()
    loop.call_exception_handler(
        {"message": "Fatal error on transport", "protocol": Request(), "exception": OSError(SECRET)}
    )
    log.stop()
    (line,) = lines(stream)
    assert (line["logger"], line["exception"]) == ("asyncio", "OSError")
    assert SECRET not in stream.getvalue()


def test_captured_libraries_write_nothing_of_their_own(
    captured: tuple[io.StringIO, Log], capsys: pytest.CaptureFixture[str]
) -> None:
    stream, log = captured
    logging.getLogger("aiohttp.server").error("Error handling request from %s", "10.0.0.1")
    logging.getLogger("aiohttp.server").info("chatter")
    log.stop()
    assert [line["logger"] for line in lines(stream)] == ["aiohttp.server"]
    assert capsys.readouterr() == ("", "")
