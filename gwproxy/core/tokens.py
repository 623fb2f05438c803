"""Counting tokens in text, and where a text may be cut without changing its count.

Pure: the vocabulary comes in as a mapping, counts go out as integers, nothing is ever downloaded.
"""

import re
from collections.abc import Iterator, Mapping
from typing import ClassVar, Protocol

import tiktoken

PIECE_CHARS = 32_768
"""The longest text given to the tokenizer in one call. Its regular expression overflows its stack
on white-space runs somewhere below a million characters, and 32 K keeps one call to a few ms."""

_PATTERN = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
_SPECIAL_TOKENS = {"<|endoftext|>": 199_999, "<|endofprompt|>": 200_018}


class Counter(Protocol):
    """Whatever can say how many tokens a text is."""

    @property
    def exact(self) -> bool:
        """False: the counts are estimates, and whoever runs the gateway should know it."""

    def count(self, text: str) -> int: ...


class Tokenizer:
    """OpenAI's o200k_base vocabulary. `count` never raises, whatever the text."""

    __slots__ = ("_encoding",)

    exact: ClassVar[bool] = True

    def __init__(self, ranks: Mapping[bytes, int]) -> None:
        # Built by hand: the library's own look-up by name goes to the network.
        self._encoding = tiktoken.Encoding(
            "o200k_base",
            pat_str=_PATTERN,
            mergeable_ranks=dict(ranks),
            special_tokens=_SPECIAL_TOKENS,
        )

    def count(self, text: str) -> int:
        if len(text) <= PIECE_CHARS:
            return self._count_piece(text)
        return sum(map(self._count_piece, pieces(text)))

    def self_test(self) -> str | None:
        """What the first golden text that is miscounted looks like, or None when all is well."""
        for text, expected in GOLDEN:
            got = self.count(text)
            if got != expected:
                return f"{text[:40]!r} is {got} tokens and should be {expected}"
        return None

    def warm_up(self) -> None:
        """Before serving: the first long piece costs a tenth of a second that the later do not."""
        self.count("x" * 5_000 + " hello" * 1_000)

    def _count_piece(self, text: str) -> int:
        try:
            return len(self._encoding.encode_ordinary(text))
        except UnicodeError:
            # The library mends lone surrogates by itself; should it stop doing so, they are the
            # model's unreadable bytes and each counts as one replacement character.
            return len(self._encoding.encode_ordinary(_without_surrogates(text)))
        except BaseException as panic:
            if not _is_panic(panic):
                raise
            return estimate_by_bytes(text)


class ByteEstimate:
    """The last resort when there is no vocabulary: four bytes a token, rounded up."""

    __slots__ = ("fault",)

    exact: ClassVar[bool] = False

    def __init__(self, fault: str = "") -> None:
        self.fault = fault
        """Why the tokenizer is not in use, in words for the operator's log."""

    def count(self, text: str) -> int:
        return estimate_by_bytes(text)


def choose_counter(ranks: Mapping[bytes, int] | None) -> Tokenizer | ByteEstimate:
    """The tokenizer, warmed up, when it counts the golden texts right; else the byte estimate.

    A gateway that cannot count exactly still serves: what it charges without a provider's usage is
    then an estimate, which is better than nothing and far better than nobody served.
    """
    if not ranks:
        return ByteEstimate("there is no vocabulary")
    try:
        tokenizer = Tokenizer(ranks)
        fault = tokenizer.self_test()
    except Exception as error:
        return ByteEstimate(f"the vocabulary cannot be used ({type(error).__name__})")
    except BaseException as panic:
        if not _is_panic(panic):
            raise
        return ByteEstimate("the vocabulary cannot be used (the tokenizer panicked)")
    if fault is not None:
        return ByteEstimate(fault)
    tokenizer.warm_up()
    return tokenizer


def estimate_by_bytes(text: str) -> int:
    return -(-len(text.encode("utf-8", "surrogatepass")) // 4)


# -- cutting ---------------------------------------------------------------------------------------

# A place p is safe when count(T) == count(T[:p]) + count(T[p:]) whatever follows. The pattern never
# looks behind, and looks ahead only past white space; so it is enough that no alternative can match
# both T[p-1] and T[p], and that the left part does not end in white space that a longer text would
# have split otherwise. Each branch below is such a pair:
#   - a space after anything but white space: a space only ever begins a match, or follows another;
#   - punctuation (no apostrophe: contractions) or a line end after a letter or a number;
#   - anything but white space and "/" after a line end: a run of white space is matched up to its
#     last line end, and punctuation takes line ends and "/" along, but nothing further;
#   - an ASCII letter beside an ASCII digit: no alternative matches both, and long hexadecimal or
#     base64 text has no other place.
# Python's white space includes all of the pattern's, so what is not white space here is none there.
_SAFE_PLACE = re.compile(
    r"(?s:.+)(?:"
    r"(?<=\S)(?= )"
    r"|(?<=[^\W_])(?=[\t\r\n!-&(-/:-@\[-`{-~"
    r"\u2013\u2014\u201c\u201d\u2026\u3001\u3002\u3008-\u3011\u3014-\u301b"
    r"\uff01\uff08\uff09\uff0c\uff0e\uff1a\uff1b\uff1f\u060c\u061b\u061f\u0964])"
    r"|(?<=[\r\n])(?=[^\s/])"
    r"|(?<=[A-Za-z])(?=[0-9])"
    r"|(?<=[0-9])(?=[A-Za-z])"
    r")"
)


def safe_place(text: str, start: int = 0, end: int = PIECE_CHARS) -> int:
    """The right-most place between `start` and `end` (both excluded) where `text` may be cut, or 0.

    Only text[start:end] is looked at, so the answer does not depend on what comes later.
    """
    found = _SAFE_PLACE.match(text, start, end)
    return found.end() if found else 0


def pieces(text: str) -> Iterator[str]:
    """`text` in parts of at most `PIECE_CHARS`, cut where it is safe, by force where nothing is."""
    start, length = 0, len(text)
    while length - start > PIECE_CHARS:
        end = start + PIECE_CHARS
        place = safe_place(text, start, end) or end
        yield text[start:place]
        start = place
    yield text[start:]


# -- other vendors ---------------------------------------------------------------------------------

_CLAUDE = re.compile(r"claude\D*?(\d{1,2})(?!\d)(?:[-.](\d{1,2})(?!\d))?")
_GEMINI = re.compile(r"gemini|gemma")
_OPENAI = re.compile(r"gpt|(?:^|[/:.])o\d|codex|davinci|babbage")
_OPEN_MODEL = re.compile(
    r"llama|deepseek|qwen|qwq|mistral|mixtral|ministral|magistral|codestral|devstral|pixtral|kimi"
    r"|glm|hermes|nemotron|falcon|phi-|yi-|olmo|granite|command|minimax|smollm|starcoder|@cf/|@hf/"
)


def family_factor(model: str) -> int:
    """How many tokens this model's family makes of 1000 tokens of o200k_base, to begin with.

    Anthropic and Google publish no vocabulary that could be shipped; the ratio learned from
    answers that carry usage replaces these as soon as there are enough of them.
    """
    name = model.lower()
    if "claude" in name:
        version = _CLAUDE.search(name)
        # From 4.7 on the tokenizer is another one. A name without a version is the newest.
        if version and (int(version[1]), int(version[2] or 0)) <= (4, 6):
            return 1150
        return 1450
    if _GEMINI.search(name):
        return 1120
    if _OPENAI.search(name):
        return 1000
    if _OPEN_MODEL.search(name):
        return 1050
    return 1000


def scale(tokens: int, per_mille: int) -> int:
    """`tokens` by a factor in per mille, rounded up once."""
    return -(-tokens * per_mille // 1000)


# -- below -----------------------------------------------------------------------------------------


def _without_surrogates(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _is_panic(error: BaseException) -> bool:
    # The library's panics derive from BaseException and their class cannot be imported. By its
    # name alone it is told from cancellation, the keyboard and the exit, which must pass.
    return type(error).__name__ == "PanicException"


GOLDEN: tuple[tuple[str, int], ...] = (
    ("", 0),
    ("hello world", 2),
    ("tiktoken is great!", 6),
    ("antidisestablishmentarianism", 6),
    ("2 + 2 = 4", 7),
    ("お誕生日おめでとう", 8),
    ("The quick brown fox jumps over the lazy dog.", 10),
    ("I'll say it's theirs; we've DON'T and they'D.", 11),
    ("def add(a: int, b: int) -> int:\n    return a + b\n", 19),
    ('{"city":"Paris","days":[1,2,3],"metric":true}', 17),
    ("   \n\n\t  x  \r\n", 4),
    ("3.14159265358979323846", 9),
    ("deadbeef" * 8, 24),
    ("我们的猫喜欢在太阳下睡觉。", 9),
    ("Привет, как дела?", 6),
    ("مرحبا بالعالم", 4),
    ("नमस्ते दुनिया", 5),
    ("안녕하세요 세계", 3),
    ("\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f389", 13),
    ("a\ud83d\ude00b\ud800", 4),
    ("<|endoftext|>", 7),
    ("e\u0301cole na\xefve", 5),
    (" " * 200, 2),
)
"""Texts of many kinds with their counts, taken with the vocabulary whose digest is pinned."""
