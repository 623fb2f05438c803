"""The report, made from what was measured and from nothing else. Pure: results in, text out."""

from collections.abc import Sequence
from statistics import median
from typing import Any

from bench.cells import (
    REACHED,
    Figure,
    Table,
    players,
    quantile,
    ratios,
    spread,
    with_added,
)
from bench.entrant import MODEL
from bench.growth import broken_steps, growth_tables
from bench.run import DIRECT, Results, label
from bench.wire import ANSWER, REQUEST_BYTES, word_event

PEERS = ("nginx", "naive")
SATURATED = 0.85
"""A helper process busier than this may have slowed what it measured."""


def cpu_table(
    results: Results,
    title: str,
    words: str,
    phase: str,
    unit: str,
    figure: Figure,
    rate: Figure,
    rate_head: str,
) -> Table:
    rows = []
    for who, kind in players(results):
        windows = results.of(phase, who).values()
        rows.append(
            [
                who,
                spread([figure(window) for window in windows], ".1f"),
                *(
                    spread(ratios(results, phase, who, label(peer, kind), figure), ".2f")
                    for peer in PEERS
                ),
                f"{median(map(rate, windows)):.0f}" if windows else "-",
            ]
        )
    head = ["proxy", f"CPU us per {unit}", *(f"x {peer}" for peer in PEERS), rate_head]
    return Table(title, words, head, rows)


def per_request_us(window: dict[str, Any]) -> float:
    return float(window["cpu_ns"] / max(1, window["completed"]) / 1000)


def per_event_us(window: dict[str, Any]) -> float:
    return float(window["cpu_ns"] / max(1, window["events"]) / 1000)


def latency_table(
    results: Results, title: str, words: str, columns: Sequence[tuple[str, str, str]]
) -> Table:
    """`columns`: the phase, the name of its figure, and how the column is headed."""
    rows = []
    for kind in results.settings.kinds:
        names = [label(DIRECT, kind), *(who for who, its in players(results) if its == kind)]
        for who in names:
            cells = [
                with_added(results, phase, who, kind, name, which)
                for phase, name, _ in columns
                for which in ("p50", "p99", "p999")
            ]
            if any(cell != "-" for cell in cells):
                rows.append([who, *cells])
    heads = [f"{head} {which}" for _, _, head in columns for which in ("p50", "p99", "p99.9")]
    return Table(title, words, ["proxy", *heads], rows)


def latency_tables(results: Results) -> list[Table]:
    wanted = results.settings
    read = (
        "Microseconds, medians over the rounds; in brackets what the proxy added to the direct "
        "way, pair by pair (the direct way to a TLS upstream speaks TLS too). All processes share "
        "the cores, so the high quantiles also hold the scheduler's share; a p99.9 of fewer than "
        "1,000 samples is the worst of them."
    )
    return [
        latency_table(
            results,
            "Added time of a request",
            f"How long a caller waits for the first byte of a non-stream answer, over "
            f"{wanted.connections} connections: at {wanted.calm_rate:.0f} requests a second, which "
            f"everybody can keep, and at {wanted.request_rate:.0f}. A proxy that cannot keep the "
            f"rate shows its queue here, and a remark says so. {read}",
            (
                ("calm requests", "first_byte_us", f"{wanted.calm_rate:.0f}/s"),
                ("paced requests", "first_byte_us", f"{wanted.request_rate:.0f}/s"),
            ),
        ),
        latency_table(
            results,
            "Added time of a stream",
            "*First byte*: from the request to the first byte of a short stream on a kept-alive "
            f"connection, one at a time, {wanted.first_bytes} a window. *Event*: from the "
            "upstream's write to the client's read, at "
            f"{wanted.streams * 1000 / wanted.stream_interval_ms:.0f} events/s. {read}",
            (
                ("first byte", "first_byte_us", "first byte"),
                ("streams", "delay_us", "event"),
            ),
        ),
    ]


def gap_table(results: Results) -> Table:
    wanted = results.settings
    rows = []
    for kind in wanted.kinds:
        for who in [label(DIRECT, kind), *(who for who, its in players(results) if its == kind)]:
            windows = results.of("streams", who).values()
            rows.append(
                [
                    who,
                    *(
                        spread([quantile("gap_us", q)(w) / 1000 for w in windows], ".2f")
                        for q in ("p50", "p99", "max")
                    ),
                ]
            )
    return Table(
        "Gaps between events",
        f"Milliseconds between two events of one stream at the client, sent every "
        f"{wanted.stream_interval_ms:g} ms; least, median and largest of the windows.",
        ["proxy", "p50", "p99", "max"],
        rows,
    )


def completeness_table(results: Results) -> Table:
    rows = []
    for who, _ in players(results):
        verdicts = [
            window["verdict"]
            for phase in ("held streams", "streams")
            for window in results.of(phase, who).values()
        ]
        held = [window["verdict"] for window in results.of("held streams", who).values()]
        lost = sum(v["events_expected"] - v["events_received"] for v in verdicts)
        rows.append(
            [
                who,
                " ".join(f"{v['whole']} of {v['streams']}" for v in held) or "-",
                f"{sum(v['whole'] for v in verdicts)} of {sum(v['streams'] for v in verdicts)}",
                str(sum(v["events_expected"] for v in verdicts)),
                str(lost),
            ]
        )
    return Table(
        "Completeness",
        "A stream is whole when every event came and the SHA-256 of its bytes equals the one the "
        f"upstream took while sending. *At once*: {max(results.settings.held_steps)} streams open "
        "at the same time; *all* adds the streams of the CPU windows.",
        ["proxy", "at once", "all", "events sent", "events lost"],
        rows,
    )


def memory_table(results: Results) -> Table:
    steps = results.settings.held_steps
    rows = []
    for who, _ in players(results):
        idle = results.idle.get(who, {})
        windows = list(results.of("held streams", who).values())
        cells = []
        for step in steps:
            per_stream = []
            for window in windows:
                base = window["weights"][0]["pss"]
                for weight in window["weights"]:
                    if weight["streams"] == step and weight["open"] == step:
                        per_stream.append((weight["pss"] - base) / step / 1024)
            cells.append(spread(per_stream, ".1f"))
        after = [window["after"]["rss"] / 2**20 for window in windows]
        rows.append(
            [
                who,
                f"{idle.get('rest at start: rss', 0) / 2**20:.1f}",
                f"{idle.get('rest at start: pss', 0) / 2**20:.1f}",
                *cells,
                spread(after, ".1f"),
                f"{idle.get('rest at end: rss', 0) / 2**20:.1f}",
            ]
        )
    return Table(
        "Memory",
        "RSS and PSS in MiB, worker processes included: what the process holds of the machine's "
        "memory, pages shared with others counted in full (RSS) or in part (PSS). *KiB a stream*: "
        "growth of PSS over the process before the first of them, both connections of the stream "
        "included, the kernel's socket buffers not; read as MiB it is what 1,024 streams take. "
        "*After*: RSS when they had ended; *end*: after all phases.",
        [
            *("proxy", "idle RSS", "idle PSS"),
            *(f"KiB a stream, {step} open" for step in steps),
            *("RSS after", "RSS end"),
        ],
        rows,
    )


def start_table(results: Results) -> Table:
    rows = []
    for who, _ in players(results):
        idle = results.idle.get(who, {})
        rows.append(
            [
                who,
                spread(results.starts_ms.get(who, []), ".0f"),
                *(
                    f"{idle.get(f'rest at {when}: cpu_ms_per_s', 0):.2f}"
                    for when in ("start", "end")
                ),
                f"{idle.get('processes', 0):.0f}",
                f"{idle.get('threads', 0):.0f}",
            ]
        )
    return Table(
        "Start and rest",
        "Milliseconds from the start of the process to its first 200. CPU while nobody calls, as "
        f"milliseconds a second over {results.settings.idle_s:g} s, before the first phase and "
        "after the last; the latter may hold the closing of pooled connections.",
        ["proxy", "start ms", "idle CPU ms/s", "at the end", "processes", "threads"],
        rows,
    )


def remarks(results: Results) -> list[str]:
    """What a reader must know before believing a figure."""
    wanted = results.settings
    said = [f"{who} did not take part: {why}." for who, why in results.absent.items()]
    for window in results.windows:
        where = f"{window['phase']}, round {window['round'] + 1}, {window['who']}"
        if "failed" in window:
            said.append(f"{where}: failed: {window['failed']}.")
            continue
        if window.get("errors"):
            said.append(f"{where}: errors: {window['errors']}.")
        if window["phase"] in ("paced requests", "calm requests"):
            calm = window["phase"] == "calm requests"
            asked = int(
                wanted.calm_rate * wanted.calm_window_s
                if calm
                else wanted.request_rate * wanted.request_window_s
            )
            reached = (window["completed"] + 1) / asked  # the last tick may fall after the end
            if reached < REACHED or window["waited"]:
                said.append(
                    f"{where}: {reached:.0%} of the requests that the rate asked for were "
                    f"answered; {window['waited']} had to wait for a free connection."
                )
        if window["phase"] == "streams":
            reached = window["rate"] / window["rate_asked"]
            if reached < REACHED:
                said.append(f"{where}: only {reached:.0%} of the rate was reached.")
            if window["still_open"] < wanted.streams:
                said.append(f"{where}: only {window['still_open']} streams were still open.")
        if window["phase"] in ("streams", "paced requests"):
            for helper in ("load", "upstream"):
                if window[f"{helper}_busy"] > SATURATED:
                    said.append(
                        f"{where}: the {helper} process used {window[f'{helper}_busy']:.0%} of a "
                        "core and may have slowed what it measured."
                    )
        # Of the growing number of streams the tables and their own remarks tell.
        verdict = None if "rate" in window and "base" in window else window.get("verdict")
        if verdict and verdict["whole"] < verdict["streams"]:
            broken = verdict["streams"] - verdict["whole"]
            said.append(f"{where}: {broken} streams were not whole: {verdict['errors']}.")
        for weight in window.get("weights", ()):
            if weight["open"] < weight["streams"]:
                said.append(
                    f"{where}: weighed with {weight['open']} instead of {weight['streams']} "
                    "streams open; left out of the table."
                )
    return said + broken_steps(results)


def tables(results: Results) -> list[Table]:
    wanted = results.settings
    request = (
        f"{REQUEST_BYTES} B of request body, {len(ANSWER)} B of answer, "
        f"{wanted.connections} keep-alive connections"
    )
    rate = wanted.streams * 1000 / wanted.stream_interval_ms
    found = [
        cpu_table(
            results,
            "CPU per request, each connection busy",
            f"Non-stream: {request}; each connection asks again as soon as it has its answer. The "
            "last column is what came out with load, proxy and upstream on the same cores; it is "
            "no throughput claim.",
            "requests",
            "request",
            per_request_us,
            lambda window: window["completed"] / window["wall_s"],
            "requests/s",
        ),
        cpu_table(
            results,
            f"CPU per request at {wanted.request_rate:.0f} requests/s",
            f"Non-stream: {request}, at a fixed rate, the same for all. A proxy that is not "
            "saturated wakes up for each request alone, so a request costs more than above.",
            "paced requests",
            "request",
            per_request_us,
            lambda window: window["completed"] / window["wall_s"],
            "requests/s",
        ),
        cpu_table(
            results,
            "CPU per streamed event",
            f"{wanted.streams} streams of {1000 / wanted.stream_interval_ms:.0f} events/s each "
            f"({rate:.0f}/s in all), {len(word_event(0, 0))} B an event, each event a segment of "
            "its own; CPU is read twice in mid-flow.",
            "streams",
            "event",
            per_event_us,
            lambda window: window["rate"],
            "events/s",
        ),
        completeness_table(results),
        *latency_tables(results),
        gap_table(results),
        memory_table(results),
        start_table(results),
        *growth_tables(results),
    ]
    return [table for table in found if table.rows]


def method(results: Results) -> str:
    wanted = results.settings
    return (
        f"One run (`{wanted.name}`) with all proxies alive; {wanted.rounds} rounds, in each of "
        "which every contestant has one window in turn, so that what slows the machine slows "
        "neighbours alike; who breaks in a window is left out of the rest of that phase and is "
        "started anew for the next. A cell shows the least, the **median** and the largest of the "
        "windows; "
        "a ratio is formed within each round, against the peer with the same kind of upstream, "
        "and then treated likewise. CPU is user plus system time of all threads and processes of "
        "the proxy, from the kernel's per-process clock, sampled by the load generator at the "
        "borders of the windows in which it counts. Windows of requests include "
        f"{wanted.request_linger_s:g} s after the last answer, so that deferred work is paid. "
        "Clients speak plain HTTP to the proxy; `+tls` means that the upstream speaks TLS and its "
        f"certificate is checked. Model `{MODEL}`; all traffic stays on loopback; the proxy is "
        f"{'pinned to a core of its own' if wanted.pin else 'not pinned to a core'}."
    )


READING = (
    "How to read it. *CPU per request* (or per event) is what one of them costs in processor time, "
    "in millionths of a second: 200 us means that one core is full at 5,000 a second. *x nginx* is "
    "how many times what nginx needs to pass the same bytes on without looking at them, *x naive* "
    "the same against the proxy that people write first. *Added time* is what a caller waits "
    "longer than without a proxy: half of the requests wait less than p50, one in a hundred longer "
    "than p99, one in a thousand longer than p99.9. What was wanted of gwproxy, and why a figure "
    "is not reached where it is not, is said in TARGETS.md beside this file."
)


def render(results: Results) -> str:
    machine = results.machine
    facts = [
        f"{machine['date']}; took {results.seconds:.0f} s",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB; "
        f"{machine['kernel']}",
        f"{machine['python']}, aiohttp {machine['aiohttp']}, uvloop {machine['uvloop']}, "
        f"httptools {machine['httptools']}, orjson {machine['orjson']}; {machine['openssl']}",
        f"load average before {machine['load_average_before']}; during the run "
        f"{machine['stolen_percent']} % of the time stolen by the hypervisor, "
        f"{machine['idle_percent']} % idle",
    ]
    lines = ["# What a proxy costs", "", "Written by `python -m bench`; not edited by hand.", ""]
    lines += [f"- {fact}" for fact in facts]
    lines += ["", method(results), "", READING, ""]
    lines += [
        f"- **{name}** ({info['version']}): {info['what']}"
        for name, info in results.took_part.items()
    ]
    lines += ["", *(str(table) for table in tables(results))]
    said = remarks(results)
    lines += ["## Remarks", ""]
    lines += [f"- {remark}" for remark in said] or [
        "None: every window was complete, every rate was reached, nothing was lost."
    ]
    return "\n".join(lines) + "\n"
