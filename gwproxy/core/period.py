"""Budget periods: the UTC month and the UTC day that a moment belongs to. Pure: time comes in.

No job resets anything: a period is a name in the key of a balance, and a new month is a new name.
"""

from datetime import UTC, date, datetime
from functools import lru_cache

DAY_MS = 86_400_000


@lru_cache(maxsize=64)
def _names(day: int) -> tuple[str, str]:
    text = date.fromordinal(day + _EPOCH).isoformat()
    return text[:7], text


_EPOCH = date(1970, 1, 1).toordinal()


def periods(at_ms: int) -> tuple[str, str]:
    """(month, day) of a moment in milliseconds since 1970: ("2026-11", "2026-11-21")."""
    return _names(at_ms // DAY_MS)


def start_ms(month: str) -> int:
    """The first millisecond of a month."""
    return (date.fromisoformat(f"{month}-01").toordinal() - _EPOCH) * DAY_MS


def months_between(earlier: str, later: str) -> int:
    """From "2025-11" to "2026-02" it is 3."""
    years = int(later[:4]) - int(earlier[:4])
    return 12 * years + int(later[5:7]) - int(earlier[5:7])


def end_ms(period: str) -> int:
    """When a period ends: the first millisecond of the next one."""
    if len(period) == 7:
        year, month = int(period[:4]), int(period[5:])
        following = date(year + month // 12, month % 12 + 1, 1)
    else:
        following = date.fromordinal(date.fromisoformat(period).toordinal() + 1)
    return (following.toordinal() - _EPOCH) * DAY_MS


def rfc3339(at_ms: int) -> str:
    """`2026-12-01T00:00:00Z`; fractions of a second only where there are any."""
    moment = datetime.fromtimestamp(at_ms // 1000, UTC)
    rest = at_ms % 1000
    return moment.strftime("%Y-%m-%dT%H:%M:%S") + (f".{rest:03d}Z" if rest else "Z")
