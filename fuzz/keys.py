"""Who gets in has sent a key that is known, whole, and no other beside it; everybody else gets one
401 that repeats nothing of what he sent. The grammar of keys and the short look at it agree."""

import random

from multidict import CIMultiDict, CIMultiDictProxy

from gwproxy.core.errors import InvalidApiKey
from gwproxy.core.identity import (
    ApiKey,
    KeyKind,
    Organization,
    User,
    digest,
    mint,
    parse,
    well_formed,
)
from gwproxy.state.keyring import Keyring

KEY = mint(KeyKind.LIVE, random.Random(1).randrange)
_OTHER = mint(KeyKind.ADMIN, random.Random(2).randrange)
_NAMES = ["Authorization", "x-api-key", "api-key", "Cookie"]
_WORDS = {b"\x01": KEY.encode(), b"\x02": _OTHER.encode(), b"\x03": b"Bearer "}
"""A byte of an input that stands for what a fuzzer would not hit upon."""
SEEDS = [b"0\x03\x01", b"0\x03\x02", b"1\x01", b"0Bearer \x01\n1\x01", b"2\x01\n1\x02", b"0\x01"]


def _keyring() -> Keyring:
    keyring = Keyring()
    parts = parse(KEY)
    keyring.apply(Organization(org_id="acme", created_at=1))
    keyring.apply(User(user_id="ann", org_id="acme", created_at=1))
    keyring.apply(
        ApiKey(
            key_id=parts.key_id,
            user_id="ann",
            prefix=parts.prefix,
            digest=digest(KEY),
            created_at=1,
        )
    )
    return keyring


_ring = _keyring()


def check(data: bytes) -> None:
    for mark, word in _WORDS.items():
        data = data.replace(mark, word)
    headers: CIMultiDict[str] = CIMultiDict()
    for line in data.split(b"\n"):
        if line:
            # As aiohttp hands them over.
            value = line[1:].decode("utf-8", "surrogateescape").strip(" \t")
            headers.add(_NAMES[line[0] % len(_NAMES)], value)
    for value in headers.values():
        assert well_formed(value) is parses(value), value
    presented = [value for name, value in headers.items() if name != "Cookie"]
    try:
        principal = _ring.authenticate(CIMultiDictProxy(headers), 2.0)
    except InvalidApiKey as error:
        assert error.status == 401
        assert error.message.isascii() and KEY[8:] not in str(error.envelope())
        return
    assert principal.user_id == "ann"
    assert presented and all(value.split(" ")[-1] == KEY for value in presented), presented


def parses(text: str) -> bool:
    try:
        parse(text)
    except ValueError:
        return False
    return True
