"""What a change of the directory takes away: that much holds at once, whatever becomes of its
record. Pure."""

from dataclasses import replace
from typing import Any, Final, TypeVar

from gwproxy.core.identity import AdminKey, ApiKey, FailureMode, Organization, Status, User

Row = TypeVar("Row", Organization, User, ApiKey, AdminKey)

# None: without limit, or without end.
_LOWER: Final = frozenset(
    (
        *("monthly_budget", "monthly_limit", "rpm", "tpm", "max_parallel"),
        *("expires_at", "revoked_at", "deleted_at"),
    )
)
_FEWER: Final = frozenset(("allowed_models", "allowed_features"))
_STRICTEST: Final = {"status": Status.SUSPENDED, "failure_mode": FailureMode.CLOSED}


def restricted(before: Row, after: Row) -> Row:
    """`before` with only those changes of `after` that allow less; `before` itself, if none do."""
    fields: dict[str, Any] = {}
    for name in before.__dataclass_fields__:
        was, becomes = getattr(before, name), getattr(after, name)
        if was == becomes:
            continue
        if name in _LOWER:
            found = min((each for each in (was, becomes) if each is not None), default=None)
        elif name in _FEWER:
            found = _both(was, becomes)
        elif name == "fallback_daily_limit":
            # Here None is the configured limit, which may be either side of any other: but 0 is 0.
            known = was is not None and becomes is not None
            found = min(was, becomes) if known else 0 if becomes == 0 else was
        else:
            found = becomes if becomes == _STRICTEST.get(name, _NOTHING) else was
        if found != was:
            fields[name] = found
    if not fields:
        return before
    return replace(before, **fields, version=after.version)


def _both(was: tuple[str, ...] | None, becomes: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """What either list allows; None allows all."""
    if was is None or becomes is None:
        return becomes if was is None else was
    return tuple(each for each in was if each in becomes)


_NOTHING: Final = object()
