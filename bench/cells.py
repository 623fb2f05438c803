"""What the tables of the report are made of. Pure: results in, cells out."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from bench.contestants import ENTRANTS
from bench.run import DIRECT, Results, label

REACHED = 0.98
"""A rate below this part of the one asked for counts as not reached."""


@dataclass(frozen=True, slots=True)
class Table:
    title: str
    words: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        widths = [
            max(len(row[i]) for row in (self.head, *self.rows)) for i in range(len(self.head))
        ]

        def line(cells: Sequence[str]) -> str:
            padded = (
                cell.ljust(width) if at == 0 else cell.rjust(width)
                for at, (cell, width) in enumerate(zip(cells, widths, strict=True))
            )
            return "| " + " | ".join(padded) + " |"

        rule = "|" + "|".join(
            "-" * (width + 2) if at == 0 else "-" * (width + 1) + ":"
            for at, width in enumerate(widths)
        )
        lines = [line(self.head), rule + "|", *(line(row) for row in self.rows)]
        return f"## {self.title}\n\n{self.words}\n\n" + "\n".join(lines) + "\n"


Figure = Callable[[dict[str, Any]], float]


def spread(values: Sequence[float], form: str) -> str:
    if not values:
        return "-"
    middle = format(median(values), form)
    if len(values) == 1:
        return middle
    return f"{min(values):{form}} - **{middle}** - {max(values):{form}}"


def players(results: Results) -> Iterator[tuple[str, str]]:
    """Label and kind, the kinds one after the other, in the order of the table of contestants."""
    for kind in results.settings.kinds:
        for entrant in ENTRANTS:
            name = label(entrant.name, kind)
            if any(window["who"] == name for window in results.windows):
                yield name, kind


def ratios(results: Results, phase: str, who: str, peer: str, figure: Figure) -> list[float]:
    """Pair by pair: each window against the peer's window of the same round."""
    mine, theirs = results.of(phase, who), results.of(phase, peer)
    return [
        figure(mine[round_]) / figure(theirs[round_])
        for round_ in sorted(mine.keys() & theirs.keys())
        if figure(theirs[round_]) > 0
    ]


def differences(results: Results, phase: str, who: str, kind: str, figure: Figure) -> list[float]:
    mine, direct = results.of(phase, who), results.of(phase, label(DIRECT, kind))
    return [
        figure(mine[round_]) - figure(direct[round_])
        for round_ in sorted(mine.keys() & direct.keys())
    ]


def quantile(name: str, which: str) -> Figure:
    return lambda window: float(window[name].get(which, float("nan")))


def with_added(results: Results, phase: str, who: str, kind: str, name: str, which: str) -> str:
    figure = quantile(name, which)
    windows = results.of(phase, who).values()
    if not windows:
        return "-"
    absolute = f"{median(map(figure, windows)):.0f}"
    if who.startswith(DIRECT):
        return absolute
    added = differences(results, phase, who, kind, figure)
    return f"{absolute} ({median(added):+.0f})" if added else absolute
