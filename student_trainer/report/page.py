"""A run's report as one HTML page. All text is escaped: sample outputs are whatever a model wrote."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from itertools import cycle
from typing import Any

from protos.scores import TeacherInfo

from ..history import Line as Metrics
from ..reporting import COLUMNS, cells, duration
from ..settings import to_yaml
from . import charts
from .charts import Line, Points
from .run_report import RunReport, Stage, versions
from .style import STYLE
from .timing import PARTS, time_spent

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
MODES = (("thinking", "thinking", 3), ("non_thinking", "non-thinking", 4))
"""Name in the metrics, name for people, colour."""


def page(run: RunReport) -> str:
    """The whole page."""
    names = " and ".join(dict.fromkeys(info.name for info in run.teachers.values()))
    title = escape(f"{run.config.models.student_model} taught by {names}")
    took = (datetime.now(UTC) - run.started).total_seconds()
    when = f"{run.started:%Y-%m-%d %H:%M} UTC, {duration(took)}"
    sections = [
        _section("Results", _results(run)),
        *(_section(s.title.capitalize(), _curves(run, s)) for s in run.stages),
        _section("Where the time went", "".join(map(_time, run.stages))),
        _section("Sample outputs", _samples(run)),
        *(
            _section(f"Teacher for {scope}" if len(run.teachers) > 1 else "Teacher", _pairs(_teacher(info)))
            for scope, info in run.teachers.items()
        ),
        _section("Run", _pairs({"command": shlex.join(run.command), "stage": run.stage, **versions()})),
        _section("Configuration", f"<details open><summary>resolved</summary>{_pre(to_yaml(run.config))}</details>"),
    ]
    return (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>'
        f"<style>{STYLE}</style></head>\n<body><header><h1>{title}</h1>"
        f'<p><b class="state">{escape(run.state)}</b> · {escape(when)}</p></header>\n'
        f"<main>{''.join(sections)}</main></body>\n</html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>\n" if body else ""


def _pre(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"


def _pairs(values: Mapping[str, Any]) -> str:
    rows = (f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in values.items())
    return f"<dl>{''.join(rows)}</dl>"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "numbers") -> str:
    """`rows` are escaped here."""
    head = "".join(f"<th>{escape(h)}</th>" for h in heads)
    body = "".join(f"<tr>{''.join(f'<td>{escape(c)}</td>' for c in row)}</tr>" for row in rows)
    return f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _results(run: RunReport) -> str:
    heads = ["model", *(title for _, title, _ in COLUMNS)]
    notes = "".join(f"<p>{escape(note)}</p>" for note in run.notes)
    return _table(heads, [cells(row) for row in run.rows]) + notes


def _curves(run: RunReport, stage: Stage) -> str:
    metrics = stage.metrics()
    if not any("loss" in m or "eval_loss" in m for m in metrics):
        return "<p>Nothing was measured yet.</p>"
    batches = f"training batches, T = {stage.temperature:g}"

    def held_out(name: str) -> Points:
        start = [(0.0, float(stage.before[name]))] if stage.before.get(name) is not None else []
        return start + _points(metrics, f"eval_{name}")

    def divergence(title: str, name: str) -> str:
        by_mode = [Line(f"held-out {label}, T = 1", held_out(f"{name}_{m}"), c) for m, label, c in MODES]
        lines = [
            Line(batches, _points(metrics, name), 1),
            Line("held-out, T = 1", held_out(name), 2),
            *by_mode,
            Line(f"own answers, T = {stage.temperature:g}", held_out(f"own_{name}"), 5),
        ]
        return charts.line_chart(title, lines, "{:.3g}".format, floor=0.0)

    loss = [Line("training batches", _points(metrics, "loss"), 1), Line("held-out", held_out("loss"), 2)]
    tail = [Line(batches, _points(metrics, "tail_share"), 1), Line("held-out, T = 1", held_out("tail_share"), 2)]
    accuracy = [Line(label, held_out(f"accuracy_{m}"), c) for m, label, c in MODES]
    modes, prefix = [m for m, _, _ in MODES], "eval_accuracy_"
    domains = {k.removeprefix(prefix) for m in metrics for k in m if k.startswith(prefix)} - set(modes)
    accuracy += [Line(d, held_out(f"accuracy_{d}"), c) for d, c in zip(sorted(domains), cycle((1, 5, 2)))]
    last = max((m["step"] for m in metrics), default=0)
    teacher = run.rows[0] if run.rows else {}
    for mode, label, colour in MODES:
        value = teacher.get(f"accuracy_{mode}")
        if value is not None and last:
            accuracy.append(Line(f"teacher {label} (dashed)", [(0, value), (last, value)], colour, dashed=True))
    figures = [
        charts.line_chart("Loss", loss, "{:.3g}".format, floor=0.0),
        divergence("Forward KL, nats a token", "forward_kl"),
        divergence("Reverse KL, nats a token", "reverse_kl"),
        charts.line_chart("Accuracy on held-out problems", accuracy, "{:.0%}".format, floor=0.0),
        charts.line_chart("The teacher's mass outside its top K", tail, _percent, floor=0.0),
    ]
    return f'<div class="charts">{"".join(figures)}</div>'


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _points(metrics: Sequence[Metrics], name: str) -> list[tuple[float, float]]:
    return [(float(m["step"]), float(m[name])) for m in metrics if name in m]


def _time(stage: Stage) -> str:
    spent = time_spent(stage.metrics())
    whole = sum(spent.values())
    if whole <= 0:
        return ""
    parts = [(label, spent[name]) for name, label in PARTS]
    rows = [[label, f"{seconds:.1f}", f"{seconds / whole:.1%}"] for label, seconds in parts]
    table = _table(["", "seconds", "share"], [*rows, ["all", f"{whole:.1f}", ""]])
    return f"<h3>{escape(stage.title)}</h3>{charts.share_bar(parts)}{table}"


def _samples(run: RunReport) -> str:
    """One row for each problem and mode: the first student's answer, and the last ones of each stage."""
    columns = [("before", run.before)]
    for stage in run.stages:
        found = [m["samples"] for m in stage.metrics() if "samples" in m]
        if found:
            columns.append((f"after {stage.title.split(',')[0]}", found[-1]))
    answers = [{(mode, problem): text for mode, problem, text in samples} for _, samples in columns]
    asked = list(dict.fromkeys(key for column in answers for key in column))
    if not asked:
        return ""
    rows = [[*key, *(column.get(key, "–") for column in answers)] for key in asked]
    return _table(["mode", "problem", *(name for name, _ in columns)], rows, "texts")


def _teacher(info: TeacherInfo) -> dict[str, Any]:
    return {
        "name": info.name,
        "fingerprint": info.fingerprint,
        "engine": info.engine,
        "data type": info.dtype,
        "quantisation": info.quantization or "none",
        "vocabulary": info.vocab_size,
    }
