"""Keys and ids: what is minted parses, what is not quite one does not."""

import random
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gwproxy.core.identity import (
    ALPHABET,
    MAX_KEY_CHARS,
    KeyKind,
    checksum,
    digest,
    is_id,
    mint,
    mint_id,
    parse,
    well_formed,
)

# Worked out by hand from the CRC-32 of the 48 characters before it.
GOLDEN = "gw_live_ABCDefgh" + "0123456789abcdefghijABCDEFGHIJ01"


def below(seed: int):
    return random.Random(seed).randrange


def slow_checksum(text: str) -> str:
    """Base62 digit by digit, the plain way."""
    crc, digits = crc32(text.encode()), ""
    for _ in range(6):
        crc, digit = divmod(crc, 62)
        digits = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"[digit] + digits
    return digits


@pytest.mark.parametrize("kind", list(KeyKind))
def test_a_minted_key_has_the_promised_shape(kind):
    key = mint(kind, below(1))
    prefix = f"gw_{kind.value}_"
    assert key.startswith(prefix)
    assert len(key) == len(prefix) + 8 + 32 + 6
    assert set(key[len(prefix) :]) <= set(ALPHABET)
    assert key[-6:] == slow_checksum(key[:-6])
    assert well_formed(key)
    parts = parse(key)
    assert (parts.kind, parts.public) == (kind, key[len(prefix) : len(prefix) + 8])
    assert parts.key_id == ("admin_" if kind is KeyKind.ADMIN else "key_") + parts.public
    assert parts.prefix == prefix + parts.public
    assert is_id(parts.key_id)


def test_a_minted_key_is_made_of_the_randomness_it_was_given():
    assert mint(KeyKind.LIVE, lambda n: 0)[:-6] == "gw_live_" + "0" * 40
    assert mint(KeyKind.LIVE, lambda n: n - 1)[:-6] == "gw_live_" + "z" * 40
    assert mint(KeyKind.LIVE, below(1)) == mint(KeyKind.LIVE, below(1))
    assert mint(KeyKind.LIVE, below(1)) != mint(KeyKind.LIVE, below(2))


def test_every_character_of_the_alphabet_is_used_equally_often():
    counts = dict.fromkeys(ALPHABET, 0)
    source = below(3)
    for _ in range(500):
        for char in mint(KeyKind.LIVE, source)[8:-6]:
            counts[char] += 1
    mean = 500 * 40 / 62
    assert all(0.7 * mean < count < 1.3 * mean for count in counts.values())


@given(st.text(alphabet=st.characters(max_codepoint=127), max_size=80))
def test_the_checksum_is_the_crc_in_base62_with_leading_zeros(text):
    assert checksum(text) == slow_checksum(text)
    assert len(checksum(text)) == 6


def test_the_checksum_is_padded_with_zeros():
    assert checksum("") == "000000"


@given(
    st.integers(0, 10**6),
    st.integers(0, 53),
    st.sampled_from(ALPHABET + "_- é\n\0"),
)
def test_one_changed_character_is_always_noticed(seed, place, char):
    key = mint(KeyKind.LIVE, below(seed))
    changed = key[:place] + char + key[place + 1 :]
    assert well_formed(changed) == (changed == key)


@given(st.integers(0, 10**6), st.integers(8, 52))
def test_two_swapped_characters_are_noticed(seed, place):
    key = mint(KeyKind.LIVE, below(seed))
    swapped = key[:place] + key[place + 1] + key[place] + key[place + 2 :]
    assert well_formed(swapped) == (swapped == key)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "shape"),
        ("gw_live_", "shape"),
        ("x" * (MAX_KEY_CHARS + 1), "longer"),
        ("gw_live_" + "0" * 292, "longer"),
        (GOLDEN + "000000", "checksum"),
        ("GW_LIVE_" + GOLDEN[8:] + checksum(GOLDEN), "shape"),
        ("gw_prod_" + GOLDEN[8:] + checksum("gw_prod_" + GOLDEN[8:]), "shape"),
        (GOLDEN + checksum(GOLDEN) + "\n", "shape"),
        (" " + GOLDEN + checksum(GOLDEN), "shape"),
        (GOLDEN + checksum(GOLDEN) + "0", "shape"),
        (GOLDEN[:-1] + "é" + checksum(GOLDEN), "shape"),
        (GOLDEN[:-1] + "\udcff" + checksum(GOLDEN), "shape"),
        (GOLDEN + "x" + checksum(GOLDEN + "x"), "shape"),
        (GOLDEN[:-1] + checksum(GOLDEN[:-1]), "shape"),
        ("' OR 1=1 --", "shape"),
        (digest(GOLDEN + checksum(GOLDEN)).hex(), "shape"),
    ],
)
def test_what_is_not_a_key_is_refused_with_a_reason_that_does_not_repeat_it(text, reason):
    assert not well_formed(text)
    with pytest.raises(ValueError, match=reason) as caught:
        parse(text)
    assert len(text) < 10 or text not in str(caught.value)


@given(st.text(max_size=300))
def test_parse_and_well_formed_agree_on_everything(text):
    try:
        parse(text)
    except ValueError:
        assert not well_formed(text)
    else:
        assert well_formed(text)


def test_a_digest_is_32_bytes_and_never_fails_on_odd_text():
    assert len(digest("gw_live_x")) == 32
    assert digest("\udcff") != digest("\udcfe")


@pytest.mark.parametrize("text", ["a", "A-b_9", "x" * 64, "-", "_"])
def test_ids(text):
    assert is_id(text)


@pytest.mark.parametrize(
    "text",
    ["", "x" * 65, "a b", "a\n", "é", "\u0430dmin", "../x", "=1+1", "a.b", "a/b", "\0", "\uff41"],
)
def test_what_is_no_id(text):
    assert not is_id(text)


def test_generated_ids_are_ids():
    assert is_id(mint_id("user", below(4)))
    assert mint_id("user", below(4)).startswith("user_")
