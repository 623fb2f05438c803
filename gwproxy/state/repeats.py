"""Which requests were made before: sent again under the same `Idempotency-Key`, one changes nothing
and is answered with the row that it made, as that is by then.

A request is known by a name made of its key, of who asks and of what is asked, and by a fingerprint
of its body; both are in its record. So they outlive the process, and neither tells what was sent.
"""

from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from gwproxy.core.errors import Conflict
from gwproxy.core.ledger import forget

_NAME_BYTES: Final = 16
_PRINT_BYTES: Final = 8


def once(actor: str, route: str, key: str, body: bytes) -> str:
    """The mark of a request, for its record."""
    name = sha256(f"{actor}\n{route}\n{key}".encode()).digest()[:_NAME_BYTES]
    return f"{name.hex()}.{sha256(body).digest()[:_PRINT_BYTES].hex()}"


@dataclass(frozen=True, slots=True)
class Made:
    lsn: int
    """Of the record that the request led to."""
    t: int
    id: str | None
    """Of the row that it is about; None where that is no row of the directory."""
    mark: str


class Repeats:
    def __init__(self) -> None:
        self._made: dict[str, Made] = {}

    def remember(self, mark: str, lsn: int, t: int, id: str | None) -> None:
        """As long as the ledger's state does, and no longer."""
        name = mark.partition(".")[0]
        if name not in self._made:
            self._made[name] = Made(lsn, t, id, mark)
            forget(self._made, t, _when)

    def find(self, mark: str | None) -> Made | None:
        """What this request has led to already; Conflict where another one had its key."""
        if mark is None:
            return None
        made = self._made.get(mark.partition(".")[0])
        if made is not None and made.mark != mark:
            raise Conflict(
                "This Idempotency-Key was sent with another body before: choose a new one.",
                code="idempotency_key_reused",
                param="Idempotency-Key",
            )
        return made


def _when(made: Made) -> int:
    return made.t
