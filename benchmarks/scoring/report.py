"""A run's result as text: its table, its bars, and the block of docs/performance.md. Pure functions of the JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.pages import between
from benchmarks.scoring.shapes import SHAPES
from benchmarks.scoring.work import GRPC, HTTP, PREFILL, TOP_64, VLLM_HTTP
from protos.scores import Field

Result = dict[str, Any]

BYTES_BAR, DECODE_BAR_MS, VLLM_HTTP_BAR = 550, 10.0, 25.0
BARRED_SHAPE = "qwen3-8b"
"""The shape at which vLLM's own HTTP server is compared."""
BEGIN, END = "<!-- results: written by benchmarks/teacher_scoring.py --page -->", "<!-- end of results -->"


@dataclass(frozen=True)
class Bar:
    """One claim with its number and what it must reach; `value` None where it was not measured."""

    claim: str
    value: float | None
    limit: float
    at_least: bool
    unit: str

    @property
    def verdict(self) -> str:
        """pass, fail, or not measured."""
        if self.value is None:
            return "not measured"
        good = self.value >= self.limit if self.at_least else self.value <= self.limit
        return "pass" if good else "FAIL"


def find(result: Result, kind: str, path: str | None = None) -> dict[str, Any] | None:
    """The first row of this kind and path that was measured."""
    for row in result["rows"]:
        if row["kind"] == kind and path in (None, row["path"]) and "tokens_per_s" in row:
            found: dict[str, Any] = row
            return found
    return None


def bars(result: Result) -> list[Bar]:
    """What this run's shape has to reach."""
    prefill, top, slow = find(result, PREFILL), find(result, TOP_64.name, GRPC), find(result, TOP_64.name, VLLM_HTTP)
    wire = result["wire"].get(TOP_64.name, {})
    shape = result["plan"]["shape"]
    found = []
    if SHAPES[shape].bar is not None:
        share = top["tokens_per_s"] / prefill["tokens_per_s"] if top and prefill else None
        found.append(Bar("top-64 over gRPC, of prefill only", share, SHAPES[shape].bar or 0.0, True, ""))
    if shape == BARRED_SHAPE:
        times = top["tokens_per_s"] / slow["tokens_per_s"] if top and slow else None
        found.append(Bar("top-64 over gRPC, times vLLM's HTTP JSON", times, VLLM_HTTP_BAR, True, "x"))
    found.append(Bar("top-64, bytes a position", wire.get("bytes_per_position"), BYTES_BAR, False, "bytes"))
    found.append(Bar("top-64, client decode of 32,768 positions", wire.get("decode_ms"), DECODE_BAR_MS, False, "ms"))
    return found


def padded(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """A Markdown table that reads well as plain text too; its first `left` columns are text, the others numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        padded = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (w + 2) if i < left else "-" * (w + 1) + ":" for i, w in enumerate(widths))
    return [line(rows[0]), f"|{rule}|", *map(line, rows[1:])]


def table(result: Result) -> list[str]:
    """The rows side by side; rates in tokens/s over all tokens of the sequences."""
    head = ["what", "path", "clients", "tokens/s", "lowest to highest", "of prefill"]
    head += ["bytes a position", "server, cores", "engine, cores", "clients, cores"]
    prefill = find(result, PREFILL)
    lines = [head]
    for row in result["rows"]:
        start = [row["kind"], row["path"], str(row["clients"] or "")]
        if "tokens_per_s" not in row:
            lines.append([*start, "failed" if "failure" in row else "skipped", "", "", "", "", "", ""])
            continue
        share = f"{row['tokens_per_s'] / prefill['tokens_per_s']:.1%}" if prefill else ""
        spread = f"{row['lowest']:,.0f} to {row['highest']:,.0f}"
        names = ("server_cores", "engine_cores", "clients_cores")
        cores = [f"{row[name]:.2f}" if name in row else "" for name in names]
        lines.append([*start, f"{row['tokens_per_s']:,.0f}", spread, share, _bytes(result, row), *cores])
    return padded(lines, left=2)


def _bytes(result: Result, row: dict[str, Any]) -> str:
    if "bytes_per_token" in row:
        return f"{row['bytes_per_token']:,.0f}"
    name = {GRPC: "bytes_per_position", HTTP: "http_bytes_per_position"}.get(row["path"], "")
    number = result["wire"].get(row["kind"], {}).get(name)
    return "" if number is None else f"{number:,.1f}"


def wire_table(result: Result) -> list[str]:
    """Answer bytes, request bytes and decode time of each kind."""
    head = [
        "what",
        "answer, bytes a position",
        "request, bytes a position",
        "client decode, ms CPU for 32,768 positions",
    ]
    lines = [head]
    for kind, found in result["wire"].items():
        if "decode_ms" in found:
            numbers = (found[n] for n in ("bytes_per_position", "request_bytes_per_position", "decode_ms"))
            lines.append([kind, *(f"{number:,.1f}" for number in numbers)])
    return padded(lines)


def bars_table(result: Result) -> list[str]:
    """The bars and whether they were reached."""
    lines = [["bar", "measured", "required", "verdict"]]
    for bar in bars(result):
        measured = "" if bar.value is None else _with_unit(bar.value, bar.unit)
        required = f"{'at least' if bar.at_least else 'at most'} {_with_unit(bar.limit, bar.unit)}"
        lines.append([bar.claim, measured, required, bar.verdict])
    return padded(lines)


def _with_unit(number: float, unit: str) -> str:
    return f"{number:,.1f} {unit}" if unit else f"{number:.1%}"


def notes(result: Result) -> list[str]:
    """A line for each part that failed or was skipped, equal ones once, and one for what the teacher lacks."""
    named = [(f"{row['kind']}, {row['path']}", row) for row in result["rows"]]
    named += [(f"{kind}, wire", found) for kind, found in result["wire"].items()]
    lines = [
        f"- {what}: {how}: {found[key].strip()}"
        for what, found in named
        for key, how in (("failure", "failed"), ("skipped", "skipped"))
        if key in found
    ]
    info = result["servers"].get("teacher", {}).get("info", {})
    if missing := sorted({field.value for field in Field} - set(info.get("fields", []))) if info else []:
        lines.append(f"- This teacher ({info['engine']}) does not offer {', '.join(missing)}.")
    return list(dict.fromkeys(lines))


def heading(result: Result) -> list[str]:
    """What was measured where, in three lines."""
    plan, found = result["plan"], result["machine"]
    load = plan["load"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    gpu = "; ".join(found["gpu"]) or "no GPU"
    cores = f"{found['cores']} cores of {found['cpu']}"
    place = [found["date"][:10], gpu, cores, f"Python {found['python']}", versions]
    sequences = f"Sequences of {load['tokens']:,} random tokens, scored from position {load['score_start']}"
    return [
        ", ".join([*place, f"commit {found['commit']}"] if found["commit"] else place) + ".",
        f"{sequences}, {load['per_call']} in a call; {plan['dtype']}, {plan['batch_tokens']:,} tokens an engine step,"
        " random weights, the server's cache off.",
        f"Medians of {plan['repeats']} rounds of {plan['seconds']:g} s or more after a warm-up, over all tokens of the"
        " sequences. Cores are CPU seconds by seconds.",
    ]


def text(result: Result) -> str:
    """Everything, for people."""
    lines = [f"### {result['plan']['shape']}", "", *heading(result), "", *table(result), ""]
    if any("decode_ms" in found for found in result["wire"].values()):
        lines += [*wire_table(result), ""]
    lines += [*bars_table(result), ""]
    if found := notes(result):
        lines += [*found, ""]
    said = "<!-- not run: the command that was measured -->"
    return "\n".join([*lines, said, "```bash", result["command"], "```", ""])


def with_results(page: str, results: Sequence[Result]) -> str:
    """The page with these results between its markers; ValueError where it has none."""
    return between(page, BEGIN, END, "\n".join(text(result) for result in results) or "None yet.\n")
