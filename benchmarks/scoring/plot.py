"""A run's rates as horizontal bars with the prefill-only rate as a line. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.scoring.report import find
from benchmarks.scoring.work import GRPC, HTTP, PREFILL

COLOURS = {GRPC: "#2563a8", HTTP: "#7aa6d6"}
OTHER = "#b0b0b0"


def draw(result: dict[str, Any], path: Path) -> None:
    """Writes the picture; its format follows from the name's ending. SystemExit with advice without matplotlib."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise SystemExit("--plot needs matplotlib: pip install 'strong2weak[benchmarks]'") from None
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "strong2weak"
    from matplotlib import pyplot

    rows = [row for row in result["rows"] if "tokens_per_s" in row][::-1]
    prefill = find(result, PREFILL)
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.36 * len(rows)), layout="constrained")
    rates = [row["tokens_per_s"] for row in rows]
    spread = [[r["tokens_per_s"] - r["lowest"] for r in rows], [r["highest"] - r["tokens_per_s"] for r in rows]]
    axes.barh(
        [_name(row) for row in rows],
        rates,
        xerr=spread,
        color=[COLOURS.get(row["path"], OTHER) for row in rows],
        error_kw={"elinewidth": 0.8, "capsize": 2},
    )
    for index, rate in enumerate(rates):
        share = f"  {rate / prefill['tokens_per_s']:.0%}" if prefill else ""
        axes.annotate(
            f"{rate:,.0f}{share}", (max(rate, 0), index), (6, 0), textcoords="offset points", va="center", fontsize=8
        )
    if prefill:
        axes.axvline(prefill["tokens_per_s"], color="#b3261e", linewidth=1, linestyle="--", label=PREFILL)
        axes.legend(loc="lower right", frameon=False, fontsize=8)
    machine = result["machine"]
    where = machine["gpu"][0].split(",")[0] if machine["gpu"] else machine["cpu"]
    axes.set_title(f"{result['plan']['shape']} on {where}, {machine['date'][:10]}", loc="left", fontsize=10)
    axes.set_xlabel("tokens/s at the clients' end")
    axes.set_xlim(0, 1.22 * max(rates, default=1.0))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def _name(row: dict[str, Any]) -> str:
    if not row["clients"]:
        return f"{row['kind']}, {row['path']}"
    return f"{row['kind']}, {row['path']}, {row['clients']} client{'s' if row['clients'] > 1 else ''}"
