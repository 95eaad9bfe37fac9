"""Rates of runs as horizontal bars, the prefill-only rate as a line, one panel for each run. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.scoring.report import find
from benchmarks.scoring.work import GRPC, HTTP, PREFILL

COLOURS = {GRPC: "#2563a8", HTTP: "#7aa6d6"}
OTHER = "#b0b0b0"
WIDTH_IN, BAR_IN, REST_IN = 9.0, 0.36, 1.2


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Writes the picture; its format follows from the name's ending. SystemExit with advice without matplotlib."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise SystemExit("--plot needs matplotlib: pip install 'strong2weak[benchmarks]'") from None
    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "strong2weak"  # equal results give equal files
    matplotlib.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot

    heights = [REST_IN + BAR_IN * len(_measured(result)) for result in results]
    figure, panels = pyplot.subplots(
        len(results),
        figsize=(WIDTH_IN, sum(heights)),
        height_ratios=heights,
        layout="constrained",
        squeeze=False,
    )
    for axes, result in zip(panels[:, 0], results, strict=True):
        _panel(axes, result)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def _measured(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in result["rows"] if "tokens_per_s" in row][::-1]


def _panel(axes: Any, result: dict[str, Any]) -> None:
    rows, prefill, machine = _measured(result), find(result, PREFILL), result["machine"]
    rates = [row["tokens_per_s"] for row in rows]
    axes.barh(
        [_name(row) for row in rows],
        rates,
        xerr=[[r["tokens_per_s"] - r["lowest"] for r in rows], [r["highest"] - r["tokens_per_s"] for r in rows]],
        color=[COLOURS.get(row["path"], OTHER) for row in rows],
        error_kw={"elinewidth": 0.8, "capsize": 2},
    )
    behind = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    for index, row in enumerate(rows):
        share = f"  {row['tokens_per_s'] / prefill['tokens_per_s']:.0%}" if prefill else ""
        place = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "fontsize": 8, "bbox": behind}
        axes.annotate(f"{row['tokens_per_s']:,.0f}{share}", (row["highest"], index), **place)
    if prefill:
        axes.axvline(prefill["tokens_per_s"], color="#b3261e", linewidth=1, linestyle="--", zorder=0)
    where = machine["gpu"][0].split(",")[0] if machine["gpu"] else machine["cpu"]
    axes.set_title(f"{result['plan']['shape']}, {where}, {machine['date'][:10]}", loc="left", fontsize=10)
    axes.set_xlabel("tokens/s at the clients' end, and its share of prefill only", fontsize=8)
    axes.set_xlim(0, 1.22 * max(rates, default=1.0))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _name(row: dict[str, Any]) -> str:
    if not row["clients"]:
        return f"{row['kind']}, {row['path']}"
    return f"{row['kind']}, {row['path']}, {row['clients']} client{'s' if row['clients'] > 1 else ''}"
