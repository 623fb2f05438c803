"""How an input says where it is cut: what is read must not depend on the network's pieces."""

_SIZES = 3

SHORT = 200
"""Longer inputs are not taken apart into single bytes as well: a fuzzer lives on its speed."""


def split(data: bytes) -> tuple[list[bytes], bytes]:
    """The rest of `data` in pieces whose sizes its first bytes give, and that rest whole."""
    sizes, whole = data[:_SIZES], data[_SIZES:]
    if not sizes:
        return [], b""
    pieces, at, turn = [], 0, 0
    while at < len(whole):
        size = 1 + sizes[turn % len(sizes)]
        pieces.append(whole[at : at + size])
        at += size
        turn += 1
    return pieces, whole


def seeded(whole: bytes, sizes: bytes = b"\x00\x0a\x50") -> bytes:
    """An input that stands for `whole`."""
    return sizes + whole
