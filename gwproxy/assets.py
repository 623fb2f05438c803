"""The data files that ship with the package, read and checked. Nothing is ever downloaded: a file
that is missing or damaged is an error that says what to do."""

import gzip
import hashlib
import zlib
from binascii import Error as Base64Error
from binascii import a2b_base64
from importlib.resources import files
from typing import Any

import orjson

PRICES = "prices.json"
RANKS = "o200k_base.tiktoken.gz"
RANKS_SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
"""Of the unzipped bytes: the digest that OpenAI's own tokenizer checks for o200k_base."""


class AssetError(Exception):
    """A data file of the package is missing or damaged; the words are meant for the operator."""


def prices() -> dict[str, Any]:
    """The compiled price table, as `gwproxy.core.pricing.PriceBook` takes it."""
    return parse_prices(_read(PRICES))


def ranks() -> dict[bytes, int]:
    """The merge ranks of o200k_base: 199,998 byte strings and the order in which they merge."""
    return parse_ranks(_read(RANKS))


def parse_prices(raw: bytes) -> dict[str, Any]:
    try:
        table = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise AssetError(
            f"{PRICES} is not JSON ({error}): reinstall gwproxy, or run `gwproxy prices build`"
        ) from None
    if not isinstance(table, dict):
        raise AssetError(f"{PRICES} is not an object: reinstall gwproxy")
    return table


def parse_ranks(raw: bytes, sha256: str = RANKS_SHA256) -> dict[bytes, int]:
    """Unzip and verify a rank file: one `base64 rank` pair a line."""
    try:
        unzipped = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise AssetError(f"{RANKS} cannot be unzipped ({error}): reinstall gwproxy") from None
    digest = hashlib.sha256(unzipped).hexdigest()
    if digest != sha256:
        raise AssetError(f"{RANKS} has the SHA-256 {digest}, not {sha256}: reinstall gwproxy")
    try:
        return {
            a2b_base64(token): int(rank)
            for token, rank in (line.split() for line in unzipped.splitlines())
        }
    except (ValueError, Base64Error) as error:
        raise AssetError(f"{RANKS} is not a rank file ({error}): reinstall gwproxy") from None


def _read(name: str) -> bytes:
    try:
        return (files("gwproxy") / "data" / name).read_bytes()
    except OSError as error:
        raise AssetError(
            f"the package's data file {name} cannot be read ({error.strerror}): reinstall gwproxy"
        ) from None
