"""Charts as SVG text: lines over steps, and bars of shares. No library, no script; colours come from the page's CSS.

Knows numbers and names, nothing of training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 10, 34
POINTS = 300
"""A line with more points than this is drawn through the means of this many groups."""

Points = Sequence[tuple[float, float]]
Format = Callable[[float], str]


@dataclass(frozen=True)
class Line:
    """One line of a chart: its name, (x, y) points, colour 1..5, and whether it is dashed."""

    name: str
    points: Points
    colour: int
    dashed: bool = False


def line_chart(title: str, lines: Iterable[Line], form: Format, *, floor: float | None = None) -> str:
    """A figure with `lines` over steps, or nothing where no line has a finite point.

    `form` writes values of y; the axis begins at `floor` where no value is below it.
    """
    kept = [Line(i.name, thinned(finite(i.points)), i.colour, i.dashed) for i in lines]
    kept = [line for line in kept if line.points]
    if not kept:
        return ""
    xs, ys = [x for i in kept for x, _ in i.points], [y for i in kept for _, y in i.points]
    low = min(ys) if floor is None else min(floor, *ys)
    x_low, x_high = min(0.0, *xs), max(1.0, *xs)
    x_ticks, y_ticks = ticks(x_low, x_high), ticks(low, max(ys))
    y_low, y_high = min(low, y_ticks[0]), max(y_ticks[-1], max(ys))

    def at(x: float, y: float) -> tuple[float, float]:
        right = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        return right, HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for value in y_ticks:
        _, y = at(x_low, value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(form(value))}</text>')
    for value in (v for v in x_ticks if v == int(v) and x_low <= v <= x_high):
        x, _ = at(value, y_low)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{value:.0f}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">step</text>')
    for line in kept:
        places = [at(x, y) for x, y in line.points]
        dash = " dashed" if line.dashed else ""
        if len(places) > 1:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            parts.append(f'<polyline class="line s{line.colour}{dash}" points="{path}"/>')
        if len(places) <= 30 and not line.dashed:
            for (x, y), (step, value) in zip(places, line.points, strict=True):
                said = escape(f"{line.name}, step {step:.0f}: {form(value)}")
                parts.append(
                    f'<circle class="s{line.colour}" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{said}</title></circle>'
                )
    head = escape(title)
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{head}">{"".join(parts)}</svg>'
    return f"<figure><figcaption>{head}</figcaption>{legend((i.name, i.colour) for i in kept)}{svg}</figure>"


def share_bar(parts: Sequence[tuple[str, float]]) -> str:
    """A bar of the given (name, amount) as shares of their sum, with colours 1, 2, ...; the sum is above 0."""
    whole, x, drawn = sum(v for _, v in parts), 0.0, []
    for colour, (name, amount) in enumerate(parts, 1):
        width = amount / whole * 1000
        said = escape(f"{name}: {amount / whole:.1%}")
        drawn.append(
            f'<rect class="s{colour}" x="{x:.1f}" width="{width:.1f}" height="26"><title>{said}</title></rect>'
        )
        x += width
    svg = f'<svg class="bar" viewBox="0 0 1000 26" preserveAspectRatio="none" role="img">{"".join(drawn)}</svg>'
    return svg + legend((f"{name} {v / whole:.1%}", i) for i, (name, v) in enumerate(parts, 1))


def legend(entries: Iterable[tuple[str, int]]) -> str:
    """Names beside their colours."""
    spans = (f'<span><i class="s{colour}"></i>{escape(name)}</span>' for name, colour in entries)
    return f'<p class="legend">{"".join(spans)}</p>'


def finite(points: Points) -> Points:
    """The points whose y is a number."""
    return [(x, y) for x, y in points if math.isfinite(y)]


def thinned(points: Points, most: int = POINTS) -> Points:
    """At most `most` points: means of groups of neighbours where there are more."""
    if len(points) <= most:
        return points
    size = math.ceil(len(points) / most)
    groups = (points[i : i + size] for i in range(0, len(points), size))
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round values of even distance from at or below `low` to at or above `high`: 1, 2 or 5 times a power of ten."""
    span = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(power * m for m in (1, 2, 5, 10, 20) if span / (power * m) <= most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]
