"""What answers have taught so far: how long they get, and how far our token counts are off.

Pure, bounded and in integers: the same answers in the same order always teach the same. All of it
may be lost without harm, for what is learned only makes holds and estimates closer.
"""

import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Annotated, Any, Final, NamedTuple, TypeVar

import msgspec

from gwproxy.core.tokens import family_factor, scale
from gwproxy.core.usage import MOST_TOKENS

MOST_PAIRS: Final = 10_000
"""Pairs of a key and a model whose lengths are remembered: 7 MB at the very most."""

MOST_MODELS: Final = 1_000
"""Far more than anybody configures; a caller who makes up names must not fill our memory."""

_K = TypeVar("_K")
_V = TypeVar("_V")


def _touched(store: OrderedDict[_K, _V], key: _K, most: int, make: Callable[[], _V]) -> _V:
    """The entry of `key`, made if need be. The one that was touched longest ago makes room."""
    entry = store.get(key)
    if entry is None:
        if len(store) >= most:
            store.popitem(last=False)
        entry = store[key] = make()
    else:
        store.move_to_end(key)
    return entry


# -- how long answers get --------------------------------------------------------------------------

KEPT: Final = 64
"""How many answers are remembered: some minutes of a busy key, some days of a quiet one."""

ENOUGH_LENGTHS: Final = 3
"""One or two answers say too little of the next one to hold no more than they took."""


class _Lengths:
    """The last 64 answers' tokens, four bytes each, and what 95 of 100 of them stay within."""

    __slots__ = ("_known", "_p95", "packed")

    def __init__(self, packed: bytes = b"") -> None:
        self.packed = packed
        self._p95: int | None = None
        self._known = False

    @property
    def p95(self) -> int | None:
        """Worked out when it is asked for: most calls say for themselves how long they may get."""
        if not self._known:
            self._p95, self._known = self._look(), True
        return self._p95

    @classmethod
    def read(cls, text: str) -> "_Lengths":
        """What `packed.hex()` had written; a ValueError for anything else."""
        packed = bytes.fromhex(text)
        if len(packed) % 4 or len(packed) > 4 * KEPT:
            raise ValueError("this is not a list of lengths")
        lengths = cls(packed)
        if max(lengths.tokens(), default=0) > MOST_TOKENS:
            raise ValueError("no answer is as long as this")
        return lengths

    def add(self, tokens: int) -> None:
        before = self.packed
        self.packed = (before + tokens.to_bytes(4, "little"))[-4 * KEPT :]
        most = self._p95
        if self._known and most is not None and len(before) == 4 * KEPT:
            gone = int.from_bytes(before[:4], "little")
            if gone == tokens or (tokens <= most if gone < most else gone > most <= tokens):
                return  # one for another on the same side: nine times in ten nothing moves
        self._known = False

    def tokens(self) -> tuple[int, ...]:
        """Oldest first."""
        return struct.unpack(f"<{len(self.packed) // 4}I", self.packed)

    def _look(self) -> int | None:
        ordered = sorted(self.tokens())
        if len(ordered) < ENOUGH_LENGTHS:
            return None
        # The nearest rank: the smallest length that at least 95 % of them do not exceed.
        return ordered[-(-95 * len(ordered) // 100) - 1]


class _SavedLengths(msgspec.Struct, forbid_unknown_fields=True):
    pairs: Annotated[list[tuple[str, str, str]], msgspec.Meta(max_length=MOST_PAIRS)]
    models: Annotated[list[tuple[str, str]], msgspec.Meta(max_length=MOST_MODELS)]


class OutputLengths:
    """How many output tokens the answers to one key's calls of one model usually have."""

    def __init__(self) -> None:
        # Both in the order of their last observation.
        self._pairs: OrderedDict[tuple[str, str], _Lengths] = OrderedDict()
        self._models: OrderedDict[str, _Lengths] = OrderedDict()

    def observe(self, key_id: str, model: str, tokens: int) -> None:
        """An answer that came to its own end had so many tokens, its reasoning included. One that
        was cut is none: holds that are too low would teach themselves."""
        if not 0 <= tokens <= MOST_TOKENS:
            tokens = min(max(tokens, 0), MOST_TOKENS)
        _touched(self._pairs, (key_id, model), MOST_PAIRS, _Lengths).add(tokens)
        _touched(self._models, model, MOST_MODELS, _Lengths).add(tokens)

    def p95(self, key_id: str, model: str) -> int | None:
        """What 95 of 100 answers stay within: of this key's last 64 from this model; where there
        are fewer than three, of the model's last 64 to anybody; else None."""
        lengths = self._pairs.get((key_id, model))
        if lengths is None or lengths.p95 is None:
            lengths = self._models.get(model)
        return None if lengths is None else lengths.p95

    def dump(self) -> dict[str, list[list[str]]]:
        """All of it, in values that JSON knows. Lengths go as they are packed, in hexadecimal."""
        return self.snapshot()()

    def snapshot(self) -> Callable[[], dict[str, list[list[str]]]]:
        """What `dump` gives, to be worked out in another thread: it would hold up the loop for
        forty milliseconds, and this for a few tenths."""
        pairs, models = list(self._pairs.items()), list(self._models.items())
        return lambda: {
            "pairs": [[*pair, lengths.packed.hex()] for pair, lengths in pairs],
            "models": [[model, lengths.packed.hex()] for model, lengths in models],
        }

    def load(self, saved: object) -> None:
        """Know what was dumped and nothing else. ValueError, and no change, when it is no dump."""
        read = msgspec.convert(saved, _SavedLengths)
        pairs = OrderedDict(((key, model), _Lengths.read(text)) for key, model, text in read.pairs)
        models = OrderedDict((model, _Lengths.read(text)) for model, text in read.models)
        self._pairs, self._models = pairs, models


# -- how far our counts are off --------------------------------------------------------------------

ENOUGH_ANSWERS: Final = 20
"""Single answers differ by some 20 % with what they are about: prose, code, another script. The
mean of twenty is then within 5 %, which is better than the 15 to 20 % of the family's factor."""

MEMORY: Final = 64
"""Each answer makes those before it weigh 1/64 less: among its likes it has 1/64 of the say, and a
vendor's new tokenizer shows after a hundred answers or so."""

LEAST_TOKENS: Final = 32
"""Shorter texts teach nothing: the one token that ends an answer would be more than 3 % of them."""

HEAVIEST_TOKENS: Final = 4_096
"""Longer texts weigh as much as this, some ten usual answers: a giant about something odd must not
speak for all."""

FARTHEST: Final = 4
"""No tokenizer makes four times as many tokens of a text as another. Whoever reports that many has
charged for something else, reasoning out of sight or an image, and teaches nothing of text."""

_UNIT: Final = 1024  # sums are kept in fractions of a token, or their fading would round away

_factor = lru_cache(maxsize=MOST_MODELS)(family_factor)

_Saved = Annotated[int, msgspec.Meta(ge=0, le=2**53)]  # what every JSON reader takes exactly


class _Ratio(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """Fading sums over one model's answers, in 1/1024 tokens."""

    model: str
    answers: _Saved = 0
    counted: _Saved = 0
    reported: _Saved = 0
    missed: _Saved = 0
    odd: _Saved = 0

    def __post_init__(self) -> None:
        if self.answers and not (self.counted and _plausible(self.counted, self.reported)):
            raise ValueError("no answers add up to this")

    @property
    def per_mille(self) -> int:
        if self.answers < ENOUGH_ANSWERS:
            return _factor(self.model)
        return -(-1000 * self.reported // self.counted)


class Learned(NamedTuple):
    """One model's ratio, for whoever shows it."""

    model: str
    per_mille: int
    """What is in force: the family's factor until there are enough answers."""
    error_per_mille: int
    """By how much the predictions were off: the mean of |predicted - reported| over the mean of
    what was reported. Each prediction is made before its answer is learned from."""
    answers: int
    odd: int
    """Answers that were too far off to be a matter of tokenizers. They are in no other figure."""


class Ratios:
    """How many tokens each model's provider reports for 1000 that we count.

    One for answers (reported without the reasoning that was not shown, against the visible text)
    and another for prompts (all of the input, cached or not, against the estimate of a prompt
    that is text alone: what is assumed for an image is a bound and would teach too low a ratio).
    """

    def __init__(self) -> None:
        self._ratios: OrderedDict[str, _Ratio] = OrderedDict()  # in the order of the last answer

    def observe(self, model: str, counted: int, reported: int) -> None:
        """We counted so many tokens, before any factor, and the provider so many."""
        if counted < LEAST_TOKENS:
            return
        ratio = _touched(self._ratios, model, MOST_MODELS, lambda: _Ratio(model))
        if not _plausible(counted, reported):
            ratio.odd += 1
            return
        if counted > HEAVIEST_TOKENS:
            reported = reported * HEAVIEST_TOKENS // counted
            counted = HEAVIEST_TOKENS
        missed = abs(reported - scale(counted, ratio.per_mille))
        ratio.answers += 1
        ratio.counted += counted * _UNIT - ratio.counted // MEMORY
        ratio.reported += reported * _UNIT - ratio.reported // MEMORY
        ratio.missed += missed * _UNIT - ratio.missed // MEMORY

    def per_mille(self, model: str) -> int:
        """The factor for `tokens.scale`: learned, or the family's until there are 20 answers."""
        ratio = self._ratios.get(model)
        return _factor(model) if ratio is None else ratio.per_mille

    def __iter__(self) -> Iterator[Learned]:
        for ratio in self._ratios.values():
            error = 1000 * ratio.missed // ratio.reported if ratio.reported else 0
            yield Learned(ratio.model, ratio.per_mille, error, ratio.answers, ratio.odd)

    def dump(self) -> list[Any]:
        """All of it, in values that JSON knows."""
        return [list(msgspec.structs.astuple(ratio)) for ratio in self._ratios.values()]

    def load(self, saved: object) -> None:
        """Know what was dumped and nothing else. ValueError, and no change, when it is no dump."""
        read = msgspec.convert(saved, _SavedRatios)
        self._ratios = OrderedDict((ratio.model, ratio) for ratio in read)


class Factors:
    """What our counts are multiplied with, in thousandths: of answers, and of prompts."""

    __slots__ = ("answers", "prompts")

    def __init__(self) -> None:
        self.answers = Ratios()
        self.prompts = Ratios()


_SavedRatios = Annotated[list[_Ratio], msgspec.Meta(max_length=MOST_MODELS)]


def _plausible(counted: int, reported: int) -> bool:
    """Whether two tokenizers could have made these counts of one text."""
    return counted <= FARTHEST * reported and reported <= FARTHEST * counted
