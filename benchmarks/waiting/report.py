"""What the runs of benchmarks/overlap.py say: medians, bars, and their part of docs/performance.md. Pure functions.

A run is {"case", "round", "lines"}: the metrics of each step that counts, as a stage writes them.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.pages import between

Run = dict[str, Any]
Result = dict[str, Any]

PACED = "as fast as the student trains"
PARTS = ("sampling", "teacher", "training")
WAITING_BAR, LATENCY_BAR = 0.10, 0.05
BEGIN, END = "<!-- results: written by benchmarks/overlap.py --page -->", "<!-- end of overlap -->"


def step_seconds(run: Run) -> dict[str, float]:
    """Mean seconds of a step by PARTS, saving and measuring left out."""
    return {part: statistics.mean(line[f"seconds_{part}"] for line in run["lines"]) for part in PARTS}


def waiting(run: Run) -> float:
    """Share of the step that waited for the teacher."""
    seconds = step_seconds(run)
    return seconds["teacher"] / sum(seconds.values())


def tokens_per_second(run: Run) -> float:
    """Completion tokens trained on by seconds of their steps."""
    tokens: float = statistics.mean(line["completion_tokens"] for line in run["lines"])
    return tokens / sum(step_seconds(run).values())


def of_case(result: Result, stage: str, staleness: int, teacher: str) -> list[Run]:
    """The runs of a case, by round."""
    case = {"stage": stage, "max_staleness": staleness, "teacher": teacher}
    return sorted((r for r in result["runs"] if r["case"] == case), key=lambda r: int(r["round"]))


def fall(result: Result, stage: str, staleness: int) -> float | None:
    """Share of the throughput that the added latency costs: the median over rounds of the ratio within a round."""
    near, far = (of_case(result, stage, staleness, latency(ms)) for ms in (0, result["latency_ms"]))
    if not near or len(near) != len(far):
        return None
    return statistics.median(1 - tokens_per_second(b) / tokens_per_second(a) for a, b in zip(near, far, strict=True))


def latency(milliseconds: int) -> str:
    """A teacher at that distance."""
    return f"{milliseconds} ms away"


def bars(result: Result) -> list[tuple[str, float | None, float]]:
    """(claim, number, what it must stay under)."""
    paced = [waiting(run) for run in of_case(result, "stage 2", 1, PACED)]
    share = statistics.median(paced) if paced else None
    added = f"throughput lost to {result['latency_ms']} ms of latency"
    return [
        (f"waiting, of a step at max_staleness 1, teacher {PACED}", share, WAITING_BAR),
        (f"{added}, stage 2 at max_staleness 1", fall(result, "stage 2", 1), LATENCY_BAR),
        (f"{added}, stage 1", fall(result, "stage 1", 0), LATENCY_BAR),
    ]


def missed(result: Result) -> bool:
    """Whether a number that was measured is not under its bar."""
    return any(value is not None and value >= bar for _, value, bar in bars(result))


def text(result: Result) -> str:
    """The result in Markdown."""
    machine, runs = result["machine"], result["runs"]
    versions = ", ".join(f"{n} {v}" for n, v in machine["versions"].items() if n in ("torch", "transformers", "grpcio"))
    where = f"{machine['date'][:10]}, {machine['cores']} cores of {machine['cpu']}, Python {machine['python']}"
    head = [
        f"{where}, {versions}, commit {machine['commit']}. Medians over {result['rounds']} rounds, each a run of "
        f"{result['steps']} steps of {result['rows']} sequences, after {result['warm_up']} that do not count.",
        "",
    ]
    rows = [["stage", "max_staleness", "teacher", "step, s", "sampling", "waiting", "training", "waiting, of a step"]]
    rows[0].append("tokens/s")
    for case in list({tuple(run["case"].values()): run["case"] for run in runs}.values()):
        same = of_case(result, case["stage"], case["max_staleness"], case["teacher"])
        parts = {part: statistics.median(step_seconds(run)[part] for run in same) for part in PARTS}
        seconds = [f"{parts[part]:.3f}" for part in PARTS]
        share, rate = (statistics.median(f(run) for run in same) for f in (waiting, tokens_per_second))
        name = [case["stage"], str(case["max_staleness"]) if case["stage"] == "stage 2" else "", case["teacher"]]
        rows.append([*name, f"{sum(parts.values()):.3f}", *seconds, f"{share:.1%}", f"{rate:,.0f}"])
    found = [["bar", "measured", "under", "verdict"]]
    for claim, value, bar in bars(result):
        verdict = "not measured" if value is None else "pass" if value < bar else "FAIL"
        found.append([claim, "" if value is None else f"{value:.1%}", f"{bar:.0%}", verdict])
    return "\n".join([*head, *table(rows, 3), "", *table(found, 1)]) + "\n"


def table(rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """A Markdown table whose first `left` columns are text."""
    rule = ["---"] * left + ["--:"] * (len(rows[0]) - left)
    return [f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:])]


def with_result(page: str, result: Result) -> str:
    """The page with this result between its markers; ValueError where it has none."""
    return between(page, BEGIN, END, text(result))
