"""The gateway's log: one row a request that got as far as a provider, as its management API shows
it. Rows come from what was served, or are planted; what is odd about them is planted too.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from decimal import Decimal
from operator import itemgetter
from typing import Any, Final

from . import prices
from .record import Served

Row = dict[str, Any]

LATE: Final = ("tokens_in", "tokens_out", "cost")
"""What a real log has only a moment after the answer's end."""

ORDERS: Final = ("created_at", "provider", "model", "model_type", "success", "cached")


class BadFilter(Exception):
    """A filter that the API would refuse; the words name it."""


class Logs:
    """The rows in the order of their time. `cost_delay_s` is how late the figures of a row come;
    `in_order = False` lists rows as they were put in, whatever order was asked for; `page_rows` is
    the most that a page has, whatever was asked for; `counted = False` keeps their number back;
    `before_page` is called before each page, for what happens while somebody reads."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._rows: list[Row] = []
        self._times: list[str] = []
        self._ready: dict[str, float] = {}
        self.cost_delay_s = 0.0
        self.in_order = True
        self.page_rows = 1 << 30
        self.counted = True
        self.before_page: Callable[[], object] = lambda: None

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def rows(self) -> list[Row]:
        """To be changed as a test likes; rows keep their time, or are planted anew."""
        return self._rows

    def clear(self) -> None:
        self._rows.clear()
        self._times.clear()
        self._ready.clear()

    def enter(
        self, served: Served, about: Mapping[str, Any], custom_cost: str | None, path: str
    ) -> None:
        """What was served, as the gateway saw it pass: usage that never passed is not known."""
        tokens = _tokens(served)
        usd: Decimal | None = None
        custom, hit = False, served.cached
        if hit:
            tokens, usd = {"in": 0, "out": 0, "cached": 0}, Decimal(0)
        elif tokens is not None:
            usd, custom = prices.cost(
                served.provider or "", served.model or "", tokens, custom_cost
            )
        row = {
            "id": served.log_id,
            "created_at": _time(served.began),
            "duration": round((served.t - served.began) * 1000),
            "provider": served.provider,
            "model": served.model,
            "path": path,
            "success": 200 <= served.status < 300,
            "status_code": served.status,
            "cached": hit,
            "tokens_in": None if tokens is None else tokens["in"],
            "tokens_out": None if tokens is None else tokens["out"],
            "cost": None if usd is None else float(usd),
            "custom_cost": custom,
            "metadata": dict(about),
            "model_type": "chat",
            "request_type": "chat",
            "request_content_type": "application/json",
            "response_content_type": "text/event-stream" if served.stream else "application/json",
            "step": 0,
        }
        if self.cost_delay_s:
            self._ready[served.log_id] = self._now() + self.cost_delay_s
        self.plant([row])

    def plant(self, rows: Iterable[Row]) -> None:
        """Rows as they are; those with equal times keep the order in which they came."""
        more = sorted(rows, key=itemgetter("created_at")) if self.in_order else list(rows)
        if self.in_order and self._times and more and more[0]["created_at"] < self._times[-1]:
            more = sorted([*self._rows, *more], key=itemgetter("created_at"))
            self._rows.clear()
            self._times.clear()
        self._rows += more
        self._times += [row["created_at"] for row in more]

    # -- reading -----------------------------------------------------------------------------

    def find(self, log_id: str) -> Row | None:
        """One row with all its figures; None also while they are not there yet."""
        for row in reversed(self._rows):
            if row["id"] == log_id:
                return row if self._is_ready(row) else None
        return None

    def page(
        self, filters: Any, order_by: str, descending: bool, page: int, per_page: int
    ) -> tuple[list[Row], int]:
        """The rows of one page, and how many there are on all."""
        self.before_page()
        per_page = min(per_page, self.page_rows)
        tests = [_read_filter(one) for one in _list(filters)]
        start, end = 0, len(self._rows)
        rest: list[Callable[[Row], bool]] = []
        for key, operator, values in tests:
            if key == "created_at" and self.in_order and operator in ("gt", "lt"):
                # As real ones do it over an index: a page of many must not read them all.
                if operator == "gt":
                    start = max(start, bisect_right(self._times, values[0]))
                else:
                    end = min(end, bisect_left(self._times, values[0]))
            else:
                rest.append(_test(key, operator, values))
        if not rest and order_by == "created_at":
            total = max(0, end - start)
            first = (page - 1) * per_page
            if descending:
                stop = end - first
                chosen = self._rows[max(start, stop - per_page) : max(start, stop)][::-1]
            else:
                chosen = self._rows[start + first : min(end, start + first + per_page)]
        else:
            found = [row for row in self._rows[start:end] if all(test(row) for test in rest)]
            if order_by != "created_at":
                found.sort(key=lambda row: str(row[order_by]))
            if descending:
                found.reverse()
            total = len(found)
            chosen = found[(page - 1) * per_page : page * per_page]
        return [self._shown(row) for row in chosen], total

    def _shown(self, row: Row) -> Row:
        return row if self._is_ready(row) else {**row, **dict.fromkeys(LATE)}

    def _is_ready(self, row: Row) -> bool:
        due = self._ready.get(row["id"])
        if due is None or due <= self._now():
            self._ready.pop(row["id"], None)
            return True
        return False


def _tokens(served: Served) -> dict[str, int] | None:
    """In the log's two figures; reasoning that a provider keeps out of its own stays out."""
    usage = served.usage
    if usage is None or not isinstance(usage.get("prompt_tokens"), int):
        return None
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens", 0) if isinstance(details, dict) else 0
    return {
        "in": usage["prompt_tokens"],
        "out": int(usage.get("completion_tokens") or 0),
        "cached": cached if isinstance(cached, int) else 0,
    }


def _time(unix_s: float) -> str:
    moment = datetime.fromtimestamp(unix_s, UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"


# -- filters ---------------------------------------------------------------------------------------

_OPERATORS: Final[Mapping[str, Callable[[Any, Any], bool]]] = {
    "eq": lambda found, wanted: bool(found == wanted),
    "neq": lambda found, wanted: bool(found != wanted),
    "contains": lambda found, wanted: str(wanted) in str(found),
    "lt": lambda found, wanted: found is not None and bool(found < wanted),
    "gt": lambda found, wanted: found is not None and bool(found > wanted),
}
_KEYS: Final = frozenset(
    {
        *("id", "created_at", "success", "cached", "provider", "model", "model_type", "cost"),
        *("tokens_in", "tokens_out", "duration", "request_type", "metadata.key", "metadata.value"),
    }
)


def _list(filters: Any) -> list[Any]:
    if not isinstance(filters, list):
        raise BadFilter("filters must be a list")
    return filters


def _read_filter(one: Any) -> tuple[str, str, list[Any]]:
    if not isinstance(one, dict) or not isinstance(one.get("value"), list) or not one["value"]:
        raise BadFilter("a filter has key, operator and a list of values")
    key, operator = str(one.get("key")), str(one.get("operator"))
    if key not in _KEYS:
        raise BadFilter(f"unknown filter key {key!r}")
    if operator not in _OPERATORS:
        raise BadFilter(f"unknown filter operator {operator!r}")
    return key, operator, one["value"]


def _test(key: str, operator: str, values: list[Any]) -> Callable[[Row], bool]:
    compare = _OPERATORS[operator]

    def test(row: Row) -> bool:
        if key == "metadata.key":
            found = list(row["metadata"])
        elif key == "metadata.value":
            found = [str(value) for value in row["metadata"].values()]
        else:
            found = [row[key]]
        return any(compare(one, value) for one in found for value in values)

    return test
