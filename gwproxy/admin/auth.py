"""Who may use the admin plane: whoever has an admin key, and nobody who only guesses.

A user's key never opens it, and an admin key never calls a model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from hmac import compare_digest
from ipaddress import IPv6Address, ip_address
from typing import Final

from multidict import MultiMapping

from gwproxy.core.errors import GatewayError
from gwproxy.core.identity import Scope, digest
from gwproxy.state.directory import Author
from gwproxy.state.keyring import MISSING, Keyring, presented_key, unauthorized

SHORTEST_KEY_CHARS: Final = 32
LONGEST_KEY_CHARS: Final = 4096
"""Longer ones are refused unread. The configured key is the operator's own text, of any form."""

_FAILURES: Final = 10
_WINDOW_S: Final = 60.0
_MOST_ADDRESSES: Final = 10_000
"""About 2 MB. Beyond it the oldest is forgotten: so many addresses gain ten guesses by it."""

BOOTSTRAP: Final = "bootstrap"
"""What the audit calls whoever has the configured key."""

_WRONG: Final = "This admin key is not valid."


@dataclass(frozen=True, slots=True)
class Administrator:
    author: Author
    scope: Scope


class AdminAuth:
    def __init__(
        self,
        bootstrap: str | None,
        keyring: Keyring,
        monotonic: Callable[[], float],
        clock: Callable[[], float],
    ) -> None:
        """`bootstrap` is the configured admin key, if there is one; the others are in the keyring.
        `clock` gives seconds since 1970."""
        shortest, longest = SHORTEST_KEY_CHARS, LONGEST_KEY_CHARS
        if bootstrap is not None and not shortest <= len(bootstrap) <= longest:
            raise ValueError(f"an admin key has {shortest} to {longest} characters")
        self._digest = None if bootstrap is None else digest(bootstrap)
        self._keyring = keyring
        self._monotonic = monotonic
        self._clock = clock
        self._failures: dict[str, tuple[float, int]] = {}  # address -> start of window, how many

    def check(
        self, headers: MultiMapping[str], peer: str | None, request_id: str = ""
    ) -> Administrator:
        """Who the admin is; InvalidApiKey (401) for others, 429 for an address that goes on.

        A request without any key is no guess and is not counted. The right key opens even while
        its address is refused: one that guesses shall not lock out the administrators beside it.
        """
        key = presented_key(headers)
        if key is None:
            raise unauthorized(MISSING)
        found = self._found(key)
        if found is None:
            address = _neighbourhood(peer)
            self._refuse_guessers(address)
            self._count_failure(address)
            raise unauthorized(_WRONG)
        actor, scope = found
        if actor != BOOTSTRAP:
            self._keyring.used_by_admin(actor, self._clock(), peer)
        return Administrator(Author(actor, peer or "", request_id), scope)

    def permit(self, admin: Administrator, *, writes: bool) -> None:
        if writes and admin.scope is not Scope.WRITE:
            raise GatewayError(
                "This admin key may read only.",
                status=403,
                type="permission_error",
                code="insufficient_scope",
                error_type="caller_auth",
            )

    def _found(self, key: str) -> tuple[str, Scope] | None:
        """The name and the scope of whoever has this key."""
        if len(key) > LONGEST_KEY_CHARS or key.startswith(("gw_live_", "gw_test_")):
            return None
        # Digests, so that neither the time nor the length says how near a guess came.
        digested = digest(key)
        if self._digest is not None and compare_digest(digested, self._digest):
            return BOOTSTRAP, Scope.WRITE
        row = self._keyring.admin_key_of(digested)
        if row is None or row.revoked_at is not None:
            return None
        if row.expires_at is not None and self._clock() >= row.expires_at:
            return None
        return row.key_id, row.scope

    def _refuse_guessers(self, address: str) -> None:
        found = self._failures.get(address)
        if found is None or found[1] < _FAILURES:
            return
        rest_s = found[0] + _WINDOW_S - self._monotonic()
        if rest_s > 0:
            raise GatewayError(
                "Too many wrong admin keys came from this address. Wait a minute.",
                status=429,
                type="rate_limit_exceeded",
                code="rate_limit_exceeded",
                error_type="caller_auth",
                retry_after_s=int(rest_s) + 1,
            )

    def _count_failure(self, address: str) -> None:
        now = self._monotonic()
        started, count = self._failures.get(address, (now, 0))
        if now - started >= _WINDOW_S:
            started, count = now, 0
        if count == 0:
            # Put at the end, so that the table stays in the order of the windows' starts.
            self._failures.pop(address, None)
            if len(self._failures) >= _MOST_ADDRESSES:
                del self._failures[next(iter(self._failures))]
        self._failures[address] = (started, count + 1)


def _neighbourhood(peer: str | None) -> str:
    """What counts as one address: an IPv6 host owns a whole /64 and changes within it at will."""
    if peer is None or ":" not in peer:
        return peer or ""
    try:
        address = ip_address(peer.partition("%")[0])
    except ValueError:
        return peer
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return address.packed[:8].hex()
    return peer
