"""An outage of the database: why, since when, and what was served and refused in it.

The path of a request reads one attribute, `lost`. All else is looked at at the two ends of it.
"""

from dataclasses import dataclass


@dataclass(slots=True)
class Outage:
    """The one under way, or the last one."""

    lost: bool = False
    """Whether the database is."""
    cause: str = ""
    stays: str = ""
    """Why no good database could be put in its place, with the cure."""
    since_s: float = 0.0
    """On the monotonic clock."""
    applied: int = 0
    """The last record that the database had when it began."""
    served: int = 0
    """Requests that were let in all the same."""
    refused: int = 0
    """Requests of organizations that are closed meanwhile."""

    def begin(self, cause: str, now_s: float, applied: int) -> None:
        self.lost, self.cause, self.since_s, self.applied = True, cause, now_s, applied
        self.stays = ""
        self.served = self.refused = 0

    @property
    def words(self) -> str:
        """Why it is lost and, where that is known, why it stays so."""
        return f"{self.cause}. It was not rebuilt: {self.stays}" if self.stays else self.cause

    def end(self, now_s: float, applied: int) -> dict[str, int | float]:
        """What it came to, for the log."""
        self.lost, self.cause, self.stays = False, "", ""
        return {
            "lost_s": round(now_s - self.since_s, 3),
            "replayed": applied - self.applied,
            "served": self.served,
            "refused": self.refused,
        }


@dataclass(frozen=True, slots=True)
class Condition:
    """How the process stands, as monitors ask."""

    draining: bool
    journal: str | None
    """Why nothing can be recorded, in words; None: it can."""
    database: str | None
    """Why the database is lost."""
    closed: bool
    """Whether nobody is served without the database, unless an organization says otherwise."""

    @property
    def status(self) -> str:
        if self.draining:
            return "draining"
        if self.journal is not None or (self.database is not None and self.closed):
            return "unavailable"
        return "ok" if self.database is None else "degraded"

    @property
    def ready(self) -> bool:
        """Whether requests should be sent here."""
        return self.status in ("ok", "degraded")
