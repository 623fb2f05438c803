"""Counting tokens, and the places where text may be cut without changing the count."""

import asyncio
import re
from itertools import pairwise
from typing import Any

import pytest
import regex
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gwproxy import assets
from gwproxy.core.tokens import (
    GOLDEN,
    PIECE_CHARS,
    ByteEstimate,
    Tokenizer,
    choose_counter,
    estimate_by_bytes,
    family_factor,
    pieces,
    safe_place,
    scale,
)

# How long an example takes says nothing here, on a machine that is busy with other things.
PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

# What texts are made of, chosen so that each alternative of the tokenizer's pattern, each class of
# character that it tells apart, and each class that Python tells apart differently, meet often.
FRAGMENTS = [
    *("a", "I", "the", "Word", "HTML", "don", "we", "naïve", "e\u0301", "ǅ", "ʰ", "ª", "\u0301"),
    *("'s", "'S", "'re", "'ll", "'", "'\u017f", "\u2019s", "`", '"'),
    *("0", "7", "12", "345", "6789", "٣", "½", "²", "Ⅷ", "\u3007", "deadBEEF09", "3f2a1"),
    *(" ", "  ", "   ", "\t", "\n", "\r\n", "\n\n", "\r", "\x0b", "\x0c"),
    *("\x1c", "\x1f", "\x85", "\xa0", "\u2028", "\u3000", "\u200b", "\ufeff", "\u180e", "\0"),
    *(".", ",", "!", "/", "//", "\\", "(", ")", "{", "};", "_", "-", "--", "+=", "<|", "|>", "@"),
    *("我们", "的", "。", "、", "「", "日本", "ひらがな", "カタカナ", "한국어", "\uff0c"),
    *("Привет", "мир", "مرحبا", "،", "नमस्ते", "।", "ไทย"),
    *("😀", "👩‍👩‍👧", "🇫🇷", "✈\ufe0f", "…", "—", "“", "”"),
    *("\ud83d", "\ude00", "\ud800", "\udfff"),
]
EVERY = "".join(map(chr, [*range(0x32400), *range(0xE0000, 0xE0200)]))
"""All the characters that are assigned."""

texts = st.lists(st.sampled_from(FRAGMENTS), max_size=24).map("".join)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(assets.ranks())


def test_counts_agree_with_what_openai_publishes(tokenizer: Tokenizer) -> None:
    # From OpenAI's cookbook, "How to count tokens with tiktoken", column o200k_base.
    assert tokenizer.count("antidisestablishmentarianism") == 6
    assert tokenizer.count("2 + 2 = 4") == 7
    assert tokenizer.count("お誕生日おめでとう") == 8
    assert tokenizer.count("tiktoken is great!") == 6


def test_the_golden_texts_are_counted_right(tokenizer: Tokenizer) -> None:
    assert tokenizer.self_test() is None
    assert len(GOLDEN) >= 20


def test_special_tokens_in_a_text_are_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.count("<|endoftext|>") == 7


def test_the_pattern_is_the_librarys_own() -> None:
    # Compared as text: calling the library's constructor would download the vocabulary.
    from inspect import getsource

    from tiktoken_ext import openai_public

    from gwproxy.core import tokens

    source = getsource(openai_public.o200k_base)
    theirs = "|".join(re.findall(r'r"""(.*?)"""', source))
    assert theirs == tokens._PATTERN


# -- cutting ---------------------------------------------------------------------------------------


@settings(PATIENT, max_examples=1_000)
@given(text=texts, end=st.integers(0, 80))
def test_a_cut_at_a_safe_place_changes_no_count(tokenizer: Tokenizer, text: str, end: int) -> None:
    """`end` hides what is still to come: the place must be safe whatever follows."""
    place = safe_place(text, 0, end)
    assert place == 0 or 0 < place < end
    if place:
        whole = tokenizer.count(text)
        assert tokenizer.count(text[:place]) + tokenizer.count(text[place:]) == whole


@settings(PATIENT, max_examples=300)
@given(text=texts)
def test_all_safe_places_together_change_no_count(tokenizer: Tokenizer, text: str) -> None:
    places = sorted({safe_place(text, 0, end) for end in range(len(text) + 1)} | {0, len(text)})
    parts = [text[a:b] for a, b in pairwise(places)]
    assert sum(map(tokenizer.count, parts)) == tokenizer.count(text)


def test_every_pair_of_fragments_may_be_cut_where_it_says(tokenizer: Tokenizer) -> None:
    for left in FRAGMENTS:
        for right in FRAGMENTS:
            text = f"x{left}{right}y"
            place = safe_place(text)
            if place:
                parts = tokenizer.count(text[:place]) + tokenizer.count(text[place:])
                assert parts == tokenizer.count(text), (left, right, place)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("one two", 3),
        ("one  two", 3),
        ("word.", 4),
        ("word'", 0),  # it may become a contraction
        ("word", 0),
        ("wo rd", 2),
        (" word", 0),
        ("line\n", 4),
        ("}\n\nx", 3),
        ("}\n\n/", 0),  # punctuation takes line ends and slashes along
        ("abc123", 3),
        ("123abc", 3),
        ("我们。", 2),
        ("      ", 0),
        ("😀😀😀", 0),
        ("", 0),
        ("x", 0),
    ],
)
def test_where_text_may_be_cut(text: str, place: int) -> None:
    assert safe_place(text) == place


def test_what_python_takes_for_letters_and_spaces_the_tokenizer_does_too() -> None:
    """The proof needs Python's letters and numbers to be the pattern's, and its non-spaces too."""
    assert set(re.findall(r"[^\W_]", EVERY)) <= set(regex.findall(r"[\p{L}\p{N}]", EVERY))
    assert set(re.findall(r"\S", EVERY)) <= set(regex.findall(r"\S", EVERY))


def test_the_marks_after_which_a_word_is_over_are_neither_letters_nor_numbers_nor_accents() -> None:
    ends = {c for c in EVERY if safe_place(f"x{c}") == 1 and not c.isascii()}
    assert len(ends) > 20
    assert not ends & set(regex.findall(r"[\p{L}\p{N}\p{M}\s]", EVERY))


@settings(PATIENT, max_examples=60)
@given(
    fragments=st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=12),
    length=st.integers(PIECE_CHARS - 40, 3 * PIECE_CHARS),
)
def test_pieces_are_short_and_make_the_text_again(fragments: list[str], length: int) -> None:
    unit = "".join(fragments)
    text = (unit * (length // len(unit) + 1))[:length]
    parts = list(pieces(text))
    assert "".join(parts) == text
    assert all(0 < len(part) <= PIECE_CHARS for part in parts)


def test_a_long_text_is_counted_as_the_library_counts_it_at_once(tokenizer: Tokenizer) -> None:
    unit = "The proxy's meter holds 512 chars.\n\n  if x > 0:\n\treturn {'a': 1}\n我们的猫。"
    text = unit * 2_000
    assert len(text) > 4 * PIECE_CHARS
    assert tokenizer.count(text) == len(tokenizer._encoding.encode_ordinary(text))


@pytest.mark.parametrize("unit", ["3f9a0c7be1d24586", "QmFzZTY0IHRleHQ", "word ", "word\n"])
def test_long_text_without_prose_is_counted_exactly_too(tokenizer: Tokenizer, unit: str) -> None:
    text = unit * (100_000 // len(unit))
    assert tokenizer.count(text) == len(tokenizer._encoding.encode_ordinary(text))


# -- what must not stop a stream -------------------------------------------------------------------


@pytest.mark.parametrize("unit", [" ", "\n ", "\u3000"])
def test_a_million_characters_of_white_space_are_counted(tokenizer: Tokenizer, unit: str) -> None:
    assert 0 < tokenizer.count(unit * 1_000_000) < 1_000_000


def test_a_panic_of_the_tokenizer_becomes_an_estimate(tokenizer: Tokenizer) -> None:
    # More than `count` would ever hand over in one piece: the library really panics.
    spaces = " " * 1_000_000
    with pytest.raises(BaseException, match="StackOverflow"):
        tokenizer._encoding.encode_ordinary(spaces)
    assert tokenizer._count_piece(spaces) == 250_000


@pytest.mark.parametrize("kind", [asyncio.CancelledError, KeyboardInterrupt, SystemExit])
def test_cancellation_and_the_exit_pass_through(kind: type[BaseException]) -> None:
    class Interrupted:
        def encode_ordinary(self, text: str) -> list[int]:
            raise kind

    tokenizer = Tokenizer.__new__(Tokenizer)
    tokenizer._encoding = Interrupted()
    with pytest.raises(kind):
        tokenizer.count("x")


def test_half_a_surrogate_pair_counts_as_a_replacement_character(tokenizer: Tokenizer) -> None:
    assert tokenizer.count("a\ud83d") == tokenizer.count("a\ufffd")
    assert tokenizer.count("a\ud83d\ude00") == tokenizer.count("a😀")


def test_a_library_that_refuses_surrogates_is_given_replacement_characters() -> None:
    class Strict:
        def encode_ordinary(self, text: str) -> list[int]:
            return list(text.encode("utf-8"))

    tokenizer = Tokenizer.__new__(Tokenizer)
    tokenizer._encoding = Strict()
    assert tokenizer.count("a\ud83d") == len("a\ufffd".encode())


@settings(PATIENT)
@given(texts)
def test_the_byte_estimate_is_a_quarter_of_the_bytes_rounded_up(text: str) -> None:
    size = len(text.encode("utf-8", "surrogatepass"))
    assert 4 * ByteEstimate().count(text) - 3 <= size <= 4 * ByteEstimate().count(text)
    assert estimate_by_bytes(text) == ByteEstimate().count(text)


# -- choosing --------------------------------------------------------------------------------------


def test_a_good_vocabulary_gives_the_tokenizer() -> None:
    counter = choose_counter(assets.ranks())
    assert counter.exact
    assert counter.count("hello world") == 2


def _wrong_order() -> dict[bytes, int]:
    ranks = assets.ranks()
    ranks[b" world"], ranks[b" zealous"] = ranks.get(b" zealous", 5), ranks[b" world"]
    del ranks[b"hello"]
    return {token: rank for rank, token in enumerate(sorted(ranks, key=ranks.__getitem__))}


@pytest.mark.parametrize(
    ("ranks", "fault"),
    [
        (None, "no vocabulary"),
        ({}, "no vocabulary"),
        ({b"a": 0, b"b": 0}, "cannot be used"),
        ({b"a": 0, b"b": 1}, "cannot be used|should be"),
        (_wrong_order, "should be"),
    ],
)
def test_a_vocabulary_that_miscounts_gives_the_byte_estimate(ranks: Any, fault: str) -> None:
    counter = choose_counter(ranks() if callable(ranks) else ranks)
    assert isinstance(counter, ByteEstimate)
    assert not counter.exact
    assert re.search(fault, counter.fault)
    assert counter.count("hello world") == 3


# -- other vendors ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "per_mille"),
    [
        ("gpt-4o", 1000),
        ("openai/gpt-5-mini", 1000),
        ("o3", 1000),
        ("openai/o4-mini", 1000),
        ("chatgpt-4o-latest", 1000),
        ("@cf/openai/gpt-oss-120b", 1000),
        ("claude-2.1", 1150),
        ("claude-3-opus-20240229", 1150),
        ("claude-3-5-sonnet-latest", 1150),
        ("claude-3.7-sonnet", 1150),
        ("anthropic/claude-opus-4-20250514", 1150),
        ("anthropic.claude-opus-4-20250514-v1:0", 1150),
        ("anthropic/claude-sonnet-4-5-20250929", 1150),
        ("claude-opus-4-6", 1150),
        ("anthropic/claude-sonnet-4.6", 1150),
        ("claude-opus-4-7", 1450),
        ("Claude-Opus-4.7", 1450),
        ("claude-opus-4-10", 1450),
        ("claude-sonnet-5-20270101", 1450),
        ("claude-opus-latest", 1450),
        ("google-ai-studio/gemini-2.5-flash", 1120),
        ("@cf/google/gemma-3-12b-it", 1120),
        ("workers-ai/@cf/meta/llama-3.1-8b-instruct", 1050),
        ("@cf/some/new-model", 1050),
        ("deepseek/deepseek-chat", 1050),
        ("Qwen/Qwen3-32B", 1050),
        ("a-model-nobody-knows", 1000),
        ("", 1000),
    ],
)
def test_the_family_of_a_model_decides_its_factor(model: str, per_mille: int) -> None:
    assert family_factor(model) == per_mille


def test_a_factor_is_applied_with_one_rounding_upwards() -> None:
    assert scale(0, 1450) == 0
    assert scale(1, 1000) == 1
    assert scale(1, 1120) == 2
    assert scale(1000, 1120) == 1120
    assert scale(7, 1150) == 9
