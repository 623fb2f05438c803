"""What is learned from answers: the 95th percentile of lengths, exactly, and the ratio of token
counts, from enough answers and not from odd ones.
"""

import math
import tracemalloc
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gwproxy.core.learned import (
    ENOUGH_ANSWERS,
    ENOUGH_LENGTHS,
    HEAVIEST_TOKENS,
    KEPT,
    LEAST_TOKENS,
    MOST_MODELS,
    MOST_PAIRS,
    Learned,
    OutputLengths,
    Ratios,
)
from gwproxy.core.tokens import family_factor, scale
from gwproxy.core.usage import MOST_TOKENS

MODEL = "openai/gpt-4o"
CLAUDE = "anthropic/claude-sonnet-4-5"  # the family's factor: 1150


def p95_by_definition(tokens: list[int]) -> int:
    """The smallest of them that at least 95 % do not exceed."""
    return min(
        one for one in tokens if sum(each <= one for each in tokens) * 100 >= 95 * len(tokens)
    )


# -- lengths ---------------------------------------------------------------------------------------


def test_before_there_is_data_nothing_is_said() -> None:
    assert OutputLengths().p95("key_1", MODEL) is None


def test_three_answers_of_a_key_are_enough() -> None:
    lengths = OutputLengths()
    for tokens in (10, 500):
        lengths.observe("key_1", MODEL, tokens)
        assert lengths.p95("key_1", MODEL) is None
    lengths.observe("key_1", MODEL, 20)
    assert lengths.p95("key_1", MODEL) == 500


def test_a_key_without_answers_of_its_own_goes_by_the_model() -> None:
    lengths = OutputLengths()
    for key_id, tokens in (("key_1", 100), ("key_2", 300), ("key_3", 200)):
        lengths.observe(key_id, MODEL, tokens)
    assert lengths.p95("key_4", MODEL) == 300
    assert lengths.p95("key_1", MODEL) == 300
    assert lengths.p95("key_1", CLAUDE) is None
    for _ in range(3):
        lengths.observe("key_1", MODEL, 50)
    assert lengths.p95("key_1", MODEL) == 100
    assert lengths.p95("key_2", MODEL) == 300


def test_only_the_last_answers_count() -> None:
    lengths = OutputLengths()
    for _ in range(100):
        lengths.observe("key_1", MODEL, 9_000)
    for _ in range(KEPT - 4):
        lengths.observe("key_1", MODEL, 7)
    assert lengths.p95("key_1", MODEL) == 9_000
    lengths.observe("key_1", MODEL, 7)
    assert lengths.p95("key_1", MODEL) == 7


@pytest.mark.parametrize(("reported", "learned"), [(-5, 0), (10**12, MOST_TOKENS)])
def test_an_absurd_length_is_cut_to_what_can_be(reported: int, learned: int) -> None:
    lengths = OutputLengths()
    for _ in range(ENOUGH_LENGTHS):
        lengths.observe("key_1", MODEL, reported)
    assert lengths.p95("key_1", MODEL) == learned


def lists(element: st.SearchStrategy[Any], most: int) -> st.SearchStrategy[list[Any]]:
    """Left to itself, Hypothesis makes lists of five or so."""
    return st.integers(0, most).flatmap(lambda n: st.lists(element, min_size=n, max_size=n))


# Few different values meet the ties, many the rest.
observed = st.one_of(lists(st.integers(0, 6), 220), lists(st.integers(0, MOST_TOKENS), 220))


@settings(deadline=None, max_examples=50)
@given(observed)
def test_the_p95_is_that_of_the_last_64_sorted(tokens: list[int]) -> None:
    lengths = OutputLengths()
    for count, each in enumerate(tokens, 1):
        lengths.observe("key_1", MODEL, each)
        if count >= ENOUGH_LENGTHS:
            expected = p95_by_definition(tokens[max(0, count - KEPT) : count])
            assert lengths.p95("key_1", MODEL) == lengths.p95("new", MODEL) == expected


callers = st.tuples(st.sampled_from("abc"), st.sampled_from("xy"), st.integers(0, 900))


@settings(deadline=None, max_examples=50)
@given(lists(callers, 200))
def test_keys_and_models_are_told_apart_and_survive_a_save(
    observations: list[tuple[str, str, int]],
) -> None:
    lengths, restored = OutputLengths(), OutputLengths()
    for key_id, model, tokens in observations:
        lengths.observe(key_id, model, tokens)
    restored.load(orjson.loads(orjson.dumps(lengths.dump())))
    assert restored.dump() == lengths.dump()
    for key_id in "abcd":
        for model in "xyz":
            own = [n for k, m, n in observations if (k, m) == (key_id, model)][-KEPT:]
            all_of_it = [n for _, m, n in observations if m == model][-KEPT:]
            told = next((each for each in (own, all_of_it) if len(each) >= ENOUGH_LENGTHS), None)
            expected = p95_by_definition(told) if told else None
            assert lengths.p95(key_id, model) == restored.p95(key_id, model) == expected


def test_at_most_ten_thousand_pairs_are_kept_and_the_oldest_go_first() -> None:
    lengths = OutputLengths()
    tracemalloc.start()
    try:
        for number in range(MOST_PAIRS + 2_000):
            for _ in range(3):
                lengths.observe(f"key_{number}", f"model_{number}", 1000 + number)
            lengths.observe("key_busy", MODEL, 5)
            lengths.observe("key_busy", MODEL, 6)
        assert tracemalloc.get_traced_memory()[0] < 12_000_000
    finally:
        tracemalloc.stop()
    dump = lengths.dump()
    assert (len(dump["pairs"]), len(dump["models"])) == (MOST_PAIRS, MOST_MODELS)
    newest = MOST_PAIRS + 2_000
    assert lengths.p95("key_busy", MODEL) == 6
    assert lengths.p95("key_0", "model_0") is None
    oldest = newest - (MOST_PAIRS - 1)
    assert lengths.p95(f"key_{oldest - 1}", f"model_{oldest - 1}") is None
    assert lengths.p95(f"key_{oldest}", f"model_{oldest}") == 1000 + oldest
    assert lengths.p95("new", f"model_{newest - MOST_MODELS}") is None
    assert lengths.p95("new", f"model_{newest - MOST_MODELS + 1}") is not None


LENGTHS_DUMP: Any = {"pairs": [["k", "m", "01000000"]], "models": [["m", "01000000"]]}


@pytest.mark.parametrize(
    "saved",
    [
        None,
        [],
        {},
        {**LENGTHS_DUMP, "more": []},
        {**LENGTHS_DUMP, "pairs": [["k", "01000000"]]},
        {**LENGTHS_DUMP, "pairs": [["k", "m", [1]]]},
        {**LENGTHS_DUMP, "pairs": [["k", "m", "0100"]]},
        {**LENGTHS_DUMP, "pairs": [["k", "m", "zz"]]},
        {**LENGTHS_DUMP, "models": [["m", "ffffffff"]]},
        {**LENGTHS_DUMP, "models": [["m", "01000000" * (KEPT + 1)]]},
        {**LENGTHS_DUMP, "models": [["m", "01000000"]] * (MOST_MODELS + 1)},
    ],
)
def test_lengths_that_were_not_saved_by_us_are_refused_and_change_nothing(saved: Any) -> None:
    lengths = OutputLengths()
    for _ in range(3):
        lengths.observe("key_1", MODEL, 70)
    with pytest.raises(ValueError):
        lengths.load(saved)
    assert lengths.p95("key_1", MODEL) == 70
    lengths.load(LENGTHS_DUMP)
    assert lengths.p95("key_1", MODEL) is None


# -- ratios ----------------------------------------------------------------------------------------


def taught(*answers: tuple[int, int], model: str = CLAUDE) -> Ratios:
    ratios = Ratios()
    for counted, reported in answers:
        ratios.observe(model, counted, reported)
    return ratios


def learned(ratios: Ratios) -> Learned:
    (one,) = ratios
    return one


@pytest.mark.parametrize("model", [MODEL, CLAUDE, "google-ai-studio/gemini-2.5-flash", "nobody"])
def test_a_model_begins_with_its_familys_factor(model: str) -> None:
    assert Ratios().per_mille(model) == family_factor(model)
    assert taught((1000, 2000), model=model).per_mille(model) == family_factor(model)


def test_twenty_answers_replace_the_familys_factor() -> None:
    ratios = taught(*[(1000, 1300)] * (ENOUGH_ANSWERS - 1))
    assert ratios.per_mille(CLAUDE) == 1150
    ratios.observe(CLAUDE, 1000, 1300)
    assert ratios.per_mille(CLAUDE) == 1300
    assert ratios.per_mille(MODEL) == 1000


def test_twenty_answers_that_differ_by_a_fifth_are_within_a_twentieth() -> None:
    kinds = [1.0, 1.4, 1.2, 1.55, 0.95, 1.3, 1.1, 1.25, 1.45, 1.15]  # in the mean 1.235
    answers = [(500, round(500 * kind)) for kind in kinds]
    assert taught(*answers * 2).per_mille(CLAUDE) == pytest.approx(1235, rel=0.05)


def test_a_new_tokenizer_shows_after_a_hundred_answers_or_so() -> None:
    ratios = taught(*[(1000, 1150)] * 500)
    assert ratios.per_mille(CLAUDE) == pytest.approx(1150, abs=1)
    for _ in range(128):
        ratios.observe(CLAUDE, 1000, 1450)
    assert ratios.per_mille(CLAUDE) > 1400
    for _ in range(500):
        ratios.observe(CLAUDE, 1000, 1450)
    assert ratios.per_mille(CLAUDE) == pytest.approx(1450, abs=1)


def test_short_texts_teach_nothing() -> None:
    ratios = taught(*[(LEAST_TOKENS - 1, 2 * LEAST_TOKENS)] * 100)
    assert list(ratios) == []
    assert ratios.per_mille(CLAUDE) == 1150


def test_one_giant_does_not_speak_for_all() -> None:
    ratios = taught(*[(400, 400)] * 100)
    before = ratios.per_mille(CLAUDE)
    ratios.observe(CLAUDE, 1_000_000, 2_000_000)
    assert before == 1000
    assert ratios.per_mille(CLAUDE) == taught(
        *[(400, 400)] * 100, (HEAVIEST_TOKENS, 2 * HEAVIEST_TOKENS)
    ).per_mille(CLAUDE)
    assert ratios.per_mille(CLAUDE) < 1200


@pytest.mark.parametrize(("counted", "reported"), [(100, 401), (100, 24), (100, 0), (100, 10**9)])
def test_what_no_tokenizer_makes_is_counted_apart_and_teaches_nothing(
    counted: int, reported: int
) -> None:
    ratios = taught(*[(100, 110)] * 30, *[(counted, reported)] * 50)
    assert ratios.per_mille(CLAUDE) == 1100
    assert (learned(ratios).answers, learned(ratios).odd) == (30, 50)
    only_odd = taught((counted, reported))
    assert learned(only_odd) == Learned(CLAUDE, 1150, 0, 0, 1)


def test_the_error_is_that_of_what_was_predicted_before_each_answer() -> None:
    # 1150 is predicted for the first twenty, and then what they have taught.
    assert learned(taught(*[(1000, 1000)] * 20)).error_per_mille == 150
    ratios = taught(*[(1000, 1000)] * 20)
    for _ in range(800):
        ratios.observe(CLAUDE, 1000, 1000)
    assert learned(ratios).error_per_mille == 0
    swinging = taught(*[(1000, 900), (1000, 1100)] * 300)
    assert learned(swinging).per_mille == pytest.approx(1000, abs=3)
    assert learned(swinging).error_per_mille == pytest.approx(100, abs=3)


answers = st.one_of(
    lists(st.tuples(st.integers(0, 20_000), st.integers(0, 80_000)), 200),
    lists(st.tuples(st.integers(30, 90), st.integers(30, 90)), 200),
)


@settings(deadline=None, max_examples=50)
@given(answers)
def test_a_ratio_is_the_fading_mean_and_stays_between_the_answers(
    answers: list[tuple[int, int]],
) -> None:
    ratios = taught(*answers, model=MODEL)
    # The same in floating point, from the definition.
    weight_of = [
        (min(counted, HEAVIEST_TOKENS), min(counted, HEAVIEST_TOKENS) * reported / counted)
        for counted, reported in answers
        if counted >= LEAST_TOKENS and counted / 4 <= reported <= counted * 4
    ]
    counted_sum = reported_sum = 0.0
    for counted, reported in weight_of:
        counted_sum = counted_sum * 63 / 64 + counted
        reported_sum = reported_sum * 63 / 64 + math.floor(reported)
    if len(weight_of) < ENOUGH_ANSWERS:
        assert ratios.per_mille(MODEL) == 1000
    else:
        expected = 1000 * reported_sum / counted_sum
        assert ratios.per_mille(MODEL) == pytest.approx(expected, abs=1.5)
        of_each = [reported / counted for counted, reported in weight_of]
        assert 1000 * min(of_each) - 1.5 <= ratios.per_mille(MODEL) <= 1000 * max(of_each) + 1.5
    assert 250 <= ratios.per_mille(MODEL) <= 4000


@settings(deadline=None, max_examples=50)
@given(answers, answers)
def test_what_was_saved_goes_on_as_if_nothing_had_been(
    before: list[tuple[int, int]], after: list[tuple[int, int]]
) -> None:
    ratios, restored = taught(*before), Ratios()
    restored.load(orjson.loads(orjson.dumps(ratios.dump())))
    for counted, reported in after:
        ratios.observe(CLAUDE, counted, reported)
        restored.observe(CLAUDE, counted, reported)
    assert restored.dump() == ratios.dump()
    assert list(restored) == list(ratios)
    assert restored.per_mille(CLAUDE) == ratios.per_mille(CLAUDE)


def test_at_most_a_thousand_models_are_kept_and_the_oldest_go_first() -> None:
    ratios = Ratios()
    for number in range(MOST_MODELS + 10):
        ratios.observe(f"model_{number}", 100, 120)
        ratios.observe("busy", 100, 120)
    models = [each.model for each in ratios]
    assert len(models) == MOST_MODELS
    assert models[0] == "model_11"
    assert models[-1] == "busy"


@pytest.mark.parametrize(
    "saved",
    [
        None,
        {},
        [["m"]] * (MOST_MODELS + 1),
        [[1, 0, 0, 0, 0, 0]],
        [["m", -1, 0, 0, 0, 0]],
        [["m", 1.5, 100, 100, 0, 0]],
        [["m", 1, 0, 0, 0, 0]],
        [["m", 1, 100, 401, 0, 0]],
        [["m", 1, 401, 100, 0, 0]],
        [["m", 1, 100, 100, 0, 0, 7]],
        [["m", 2**60, 100, 100, 0, 0]],
    ],
)
def test_ratios_that_were_not_saved_by_us_are_refused_and_change_nothing(saved: Any) -> None:
    ratios = taught(*[(1000, 1300)] * 20)
    with pytest.raises(ValueError):
        ratios.load(saved)
    assert ratios.per_mille(CLAUDE) == 1300
    ratios.load([])
    assert ratios.per_mille(CLAUDE) == 1150


def test_a_learned_ratio_is_a_factor_for_scale() -> None:
    assert scale(1_000, taught(*[(300, 371)] * 40).per_mille(CLAUDE)) == 1_237
