"""The package's data files are what they claim to be, and say so clearly when they are not."""

import gzip
import hashlib
from pathlib import Path

import orjson
import pytest

from gwproxy import assets


def test_the_vocabulary_is_whole_and_verified() -> None:
    ranks = assets.ranks()
    assert len(ranks) == 199_998
    assert set(ranks.values()) == set(range(199_998))
    assert all(bytes([byte]) in ranks for byte in range(256))
    assert ranks[b" the"] < 1000


def test_the_price_table_is_an_object_with_a_version() -> None:
    table = assets.prices()
    assert table["version"].startswith("genai-prices-")
    assert "openai" in table["providers"]


def damaged(change: str) -> bytes:
    raw = (Path(assets.__file__).parent / "data" / assets.RANKS).read_bytes()
    match change:
        case "cut":
            return raw[: len(raw) // 2]
        case "empty":
            return b""
        case "not zipped":
            return b"IQ== 0\n"
        case "other words":
            return gzip.compress(b"IQ== 0\n")
    middle = len(raw) // 2
    return raw[:middle] + bytes([raw[middle] ^ 0xFF]) + raw[middle + 1 :]


@pytest.mark.parametrize("change", ["cut", "empty", "not zipped", "other words", "one byte"])
def test_a_damaged_vocabulary_is_never_used(change: str) -> None:
    with pytest.raises(assets.AssetError, match="reinstall gwproxy"):
        assets.parse_ranks(damaged(change))


@pytest.mark.parametrize("line", [b"IQ==", b"IQ== x", b"I 0", b"IQ== 0 0"])
def test_lines_that_are_no_ranks_are_told(line: bytes) -> None:
    digest = hashlib.sha256(line).hexdigest()
    with pytest.raises(assets.AssetError, match="not a rank file"):
        assets.parse_ranks(gzip.compress(line), digest)


def test_the_rank_file_format_is_a_token_and_its_rank() -> None:
    text = b"IQ== 0\nIHRoZQ== 1\n"
    digest = hashlib.sha256(text).hexdigest()
    assert assets.parse_ranks(gzip.compress(text), digest) == {b"!": 0, b" the": 1}


@pytest.mark.parametrize(
    ("raw", "words"), [(b"{", "not JSON"), (orjson.dumps([]), "not an object")]
)
def test_a_damaged_price_table_says_what_to_do(raw: bytes, words: str) -> None:
    with pytest.raises(assets.AssetError, match=words):
        assets.parse_prices(raw)
