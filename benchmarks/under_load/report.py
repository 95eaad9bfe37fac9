"""A run's result as text: bars, tables, and the block of docs/reliability.md. Pure functions of the JSON."""

from __future__ import annotations

from typing import Any

from benchmarks.pages import between
from benchmarks.scoring.report import Bar, padded

Result = dict[str, Any]
BEGIN, END = "<!-- load: written by benchmarks/load.py --page -->", "<!-- end of load -->"
GOODPUT, REFUSED_MS, GROWTH, JAIN = 0.95, 50.0, 0.02, 0.95
OVER = 2.0
"""Times its capacity from which a server is overloaded."""
SHARED = 0.2
"""Cores of other processes from which a machine was not this run's alone."""


def bars(server: Result) -> list[Bar]:
    """What one server has to reach under every overload."""
    rows = server["rows"]
    over = [row for row in rows if row["load"] >= OVER]
    refused = [row["refused_p99_ms"] for row in rows if row["refused_p99_ms"] is not None]
    shares = [row["jain"] for row in over if row["jain"] is not None]
    peak = max(row["goodput"] for row in rows)
    failed = sum(sum(row["failed"].values()) for row in rows)
    return [
        Bar(
            "lowest goodput under overload, of the peak",
            _lowest([r["goodput"] / peak for r in over]),
            GOODPUT,
            True,
            "",
        ),
        Bar("slowest p99 of refusals", max(refused, default=None), REFUSED_MS, False, "ms"),
        Bar("lowest Jain index under overload", _lowest(shares), JAIN, True, ""),
        Bar("growth of memory under overload", server["memory"]["growth"], GROWTH, False, ""),
        Bar("calls that failed otherwise", float(failed), 0.0, False, "calls"),
    ]


def _lowest(numbers: list[float]) -> float | None:
    return min(numbers, default=None)


def missed(result: Result) -> bool:
    """Whether a bar was missed."""
    return any(bar.verdict == "FAIL" for server in result["servers"].values() for bar in bars(server))


def table(server: Result) -> list[str]:
    """A row for each number of clients and load."""
    head = ["clients", "offered, x capacity", "goodput, tokens/s", "of the peak", "answered", "refused"]
    head += ["refused p50 / p99, ms", "Jain", "server, clients, others: cores"]
    peak = max(row["goodput"] for row in server["rows"])
    lines = [head]
    for row in server["rows"]:
        cores = ", ".join(f"{row[name]:.2f}" for name in ("server_cores", "clients_cores", "others_cores"))
        times = f"{row['refused_p50_ms']:.1f} / {row['refused_p99_ms']:.1f}" if row["refused"] else ""
        share = "" if row["jain"] is None else f"{row['jain']:.3f}"
        numbers = [f"{row['goodput']:,.0f}", f"{row['goodput'] / peak:.1%}", str(row["answered"]), str(row["refused"])]
        lines.append([str(row["clients"]), f"{row['load']:g}", *numbers, times, share, cores])
    return padded(lines, left=0)


def text(result: Result) -> str:
    """Everything, for people."""
    found, plan = result["machine"], result["plan"]
    where = f"{found['date'][:10]}, {found['cores']} cores of {found['cpu']}, Python {found['python']}"
    where += f", commit {found['commit']}" if found["commit"] else ""
    lines = [f"{where}; {result['took_s']:.0f} s in all."]
    if found["others_cores"] > SHARED:
        lines.append(
            f"**The machine was shared**: others took {found['others_cores']:.1f} of its {found['cores']} cores"
            " meanwhile, so times and rates are worse than they would be."
        )
    lines += ["", "<!-- not run: the command that was measured -->", "```bash", result["command"], "```", ""]
    for name, server in result["servers"].items():
        call, memory = server["call"], server["memory"]
        lines += [
            f"### {name}",
            "",
            f"Capacity {server['capacity']:,.0f} tokens/s, calls of {call['sequences']} x {call['tokens']} tokens, top "
            f"{call['top_k']}, a queue of {plan['queue_s']:g} s of work, no cache.",
            f"Memory over {plan['steady_s']:g} s at four times the capacity, {memory['calls']:,} calls: "
            f"{memory['begin_mib']:.1f} MiB, then {memory['end_mib']:.1f} MiB, "
            f"{memory['slope_mib_per_minute']:+.2f} MiB a minute; {memory['first_mib']:.1f} MiB before the first call.",
            "",
            *table(server),
            "",
            *_bars_table(server),
            "",
        ]
    return "\n".join(lines)


def _bars_table(server: Result) -> list[str]:
    lines = [["bar", "measured", "required", "verdict"]]
    for bar in bars(server):
        measured = "" if bar.value is None else _shown(bar.value, bar)
        lines.append(
            [bar.claim, measured, f"{'at least' if bar.at_least else 'at most'} {_shown(bar.limit, bar)}", bar.verdict]
        )
    return padded(lines)


def _shown(number: float, bar: Bar) -> str:
    if bar.unit:
        return f"{number:,.0f} {bar.unit}" if bar.unit == "calls" else f"{number:,.1f} {bar.unit}"
    return f"{number:.3f}" if "Jain" in bar.claim else f"{number:.1%}"


def with_result(page: str, result: Result) -> str:
    """The page with this result between its markers; ValueError where it has none."""
    return between(page, BEGIN, END, text(result))
