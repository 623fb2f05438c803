"""How CPU, time and memory grow with the number of open streams. Pure: results in, tables out."""

from collections.abc import Callable, Mapping
from typing import Any

from bench.cells import REACHED, Table, players
from bench.run import DIRECT, Results, growth_phase, label

MIB = 2**20
WEIGHABLE = 100
"""With fewer streams the process's own ups and downs outweigh them."""
LAST_TICKS = 2
"""Events that may fall beyond the end of a short window."""


def breakage(window: Mapping[str, Any]) -> str:
    """Why a step does not count as carried; nothing when it does."""
    if "failed" in window:
        return f"the window failed: {window['failed']}"
    streams, verdict = window["streams"], window["verdict"]
    if window["still_open"] < streams:
        said = f"only {window['still_open']} of {streams} streams were open in the window"
        return f"{said}: {verdict['errors']}" if verdict["errors"] else said
    if window["events"] + LAST_TICKS < REACHED * window["rate_asked"] * window["wall_s"]:
        return f"only {window['rate'] / window['rate_asked']:.0%} of the events came in time"
    if verdict["whole"] < streams:
        return f"{streams - verdict['whole']} streams were not whole: {verdict['errors']}"
    return ""


def steps_of(results: Results, who: str) -> list[Mapping[str, Any] | None]:
    """The window of each step, in order; None where there was none."""
    found = {window["phase"]: window for window in results.windows if window["who"] == who}
    return [found.get(growth_phase(step)) for step in results.settings.growth_steps]


def broken_steps(results: Results) -> list[str]:
    kind = results.settings.kinds[0]
    return [
        f"{step} streams, {who}: broken: {why}."
        for who, its in players(results)
        if its == kind
        for step, window in zip(results.settings.growth_steps, steps_of(results, who), strict=True)
        if window is not None and (why := breakage(window))
    ]


def _table(
    results: Results,
    title: str,
    words: str,
    cell: Callable[[Mapping[str, Any]], str],
    *,
    direct: bool,
) -> Table:
    kind = results.settings.kinds[0]
    names = [label(DIRECT, kind)] if direct else []
    names += [who for who, its in players(results) if its == kind]
    rows = []
    for who in names:
        windows = steps_of(results, who)
        if not any(windows):
            continue
        cells = []
        for window in windows:
            if window is None:
                cells.append("-")
            elif breakage(window):
                cells.append("broken")
            else:
                cells.append(cell(window))
        rows.append([who, *cells])
    heads = [f"{step} streams" for step in results.settings.growth_steps]
    return Table(title, words, ["proxy", *heads], rows)


def growth_tables(results: Results) -> list[Table]:
    wanted = results.settings
    steps = wanted.growth_steps
    direct = {
        step: window
        for step, window in zip(
            steps, steps_of(results, label(DIRECT, wanted.kinds[0])), strict=True
        )
        if window is not None and not breakage(window)
    }

    def added(window: Mapping[str, Any]) -> str:
        cells = []
        for which in ("p50", "p99"):
            own = window["delay_us"].get(which, float("nan"))
            beside = direct.get(window["streams"])
            more = ""
            if beside is not None and beside is not window:
                more = f" ({own - beside['delay_us'][which]:+.0f})"
            cells.append(f"{own:.0f}{more}")
        return " / ".join(cells)

    def weighed(window: Mapping[str, Any]) -> str:
        cell = f"{window['weight']['rss'] / MIB:.0f}"
        if window["streams"] < WEIGHABLE:
            return cell
        grown = window["weight"]["pss"] - window["base"]["pss"]
        return f"{cell} ({grown / window['streams'] / 1024:.1f})"

    same = (
        f"{wanted.growth_rate:.0f} events a second in all, however many streams share them: only "
        "the number of streams differs from column to column. *broken*: the proxy did not "
        "carry that many, for the reason among the remarks; more were then not tried."
    )
    tables = [
        _table(
            results,
            "CPU per event, by the number of streams",
            f"Microseconds of CPU for each event, with so many streams open. {same}",
            lambda window: f"{window['cpu_ns'] / max(1, window['events']) / 1000:.1f}",
            direct=False,
        ),
        _table(
            results,
            "Time of an event, by the number of streams",
            "Microseconds from the upstream's write to the client's read, p50 / p99; in brackets "
            f"what the proxy added to the direct way. {same}",
            added,
            direct=True,
        ),
        _table(
            results,
            "Memory, by the number of streams",
            "RSS of the whole proxy in MiB with so many streams open, and in brackets its growth "
            f"for each stream in KiB of PSS, from {WEIGHABLE} streams on. {same}",
            weighed,
            direct=False,
        ),
        _table(
            results,
            "Opening, by the number of streams",
            "Seconds until all of them had their first event; they are asked for over the time "
            "between two events of a stream.",
            lambda window: f"{window['opened_s']:.1f}",
            direct=True,
        ),
    ]
    return [table for table in tables if table.rows]
