"""`python -m teacher_server top`: the live page in a terminal, from the same numbers.

It shows what `GET /status` gives and knows nothing of how that comes about.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from teacher_server.commands.remote import Place, Remote, RemoteError, parser_of, run

BARS = " ▁▂▃▄▅▆▇█"


def main(arguments: Sequence[str]) -> int:
    """Runs the command."""
    parser = parser_of("top", "Shows who uses a teacher, what they get, its engine and the last errors, live.")
    parser.add_argument("--every", type=float, default=2.0, metavar="S", help="Seconds between looks [default: 2].")
    parser.add_argument("--once", action="store_true", help="Print one picture and stop.")
    return run(parser, arguments, _top)


def _top(options: Any, place: Place) -> int:
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    if not options.every > 0:
        raise RemoteError(f"--every must be above 0, got {options.every}")
    console = Console()
    with Remote(place) as remote:
        status = remote.json("GET", "/status")
        if options.once or not console.is_terminal:
            console.print(picture(status, console.width))
            return 0
        with Live(picture(status, console.width), console=console, screen=True, auto_refresh=False) as live:
            while True:
                time.sleep(options.every)
                try:
                    status = remote.json("GET", "/status")
                except RemoteError as error:
                    said = Text(f"{error}; trying again", style="red")
                    live.update(Group(said, picture(status, console.width)), refresh=True)
                else:
                    live.update(picture(status, console.width), refresh=True)


def picture(s: dict[str, Any], width: int) -> Any:
    """Something that rich prints, of a status."""
    from rich.console import Group
    from rich.text import Text

    head = Text()
    head.append(s["name"] or "teacher", style="bold")
    head.append(f"  ● {s['state']}", style="green" if s["ready"] else "red")
    head.append(f"  {s['engine']} {s['dtype']}  {s['fingerprint'][:12]}  up {_span(s['up_s'])}", style="dim")
    total = sum(s["sequences"].values())
    hits = f"{1 - s['sequences'].get('engine', 0) / total:.0%}" if total else "–"
    rates = s["rates"]
    now = Text(
        f"scored {_n(rates['scored'])}/s   generated {_n(rates['generated'])}/s   from cache {_n(rates['cached'])}/s   "
        f"calls {sum(c['in_flight'] for c in s['clients'])}   queue {_n(s['queue_tokens'])} of "
        f"{_n(s['queue_tokens_limit'])} tokens   cache hits {hits}   restarts {s['restarts']}   last step "
        f"{'–' if s['last_step_s'] is None else _span(s['last_step_s']) + ' ago'}"
    )
    parts: list[Any] = [head, now]
    if s["history"]:
        points = [one["scored"] for one in s["history"]][-max(10, width - 20) :]
        parts.append(Text.assemble(("scored/s ", "dim"), _bars(points), (f" top {_n(max(points))}", "dim")))
    parts += [_clients(s["clients"]), _calls(s), _errors(s["errors"])]
    return Group(*parts)


def _table(*columns: str, left: Iterable[int] = (0,)) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim")
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i in left else "right", no_wrap=True)
    return table


def _clients(clients: list[dict[str, Any]]) -> Any:
    from rich.text import Text

    table = _table(
        *("client", "now", "queued", "scored/s", "generated/s", "cached/s", "known", "score p50", "p99", "calls"),
        *("failed", "last call"),
    )
    for c in clients:
        name = Text(c["name"])
        name.append(f" {c['label']}" if c["label"] else "", style="dim")
        rates, known = c["rates"], "–" if c["known_share"] is None else f"{c['known_share']:.0%}"
        table.add_row(
            *(name, str(c["in_flight"]), _n(c["waiting_tokens"]), _n(rates["scored"]), _n(rates["generated"])),
            *(_n(rates["cached"]), known, _s(c["score"]["p50"]), _s(c["score"]["p99"]), _n(c["calls"])),
            *(Text(_n(c["failed"]), style="red" if c["failed"] else ""), _span(c["idle_s"])),
            style="" if c["in_flight"] or c["idle_s"] < 30 else "dim",
        )
    return table if clients else Text("nobody has called yet", style="dim")


def _calls(s: dict[str, Any]) -> Any:
    table = _table("", "p50", "p90", "p99", "of", "batch", "tokens", "seconds", "read-out", "held now")
    for kind, latency in s["latency"].items():
        steps = s["steps"].get(kind) or {}
        ran = bool(steps.get("steps"))
        table.add_row(
            *(kind, _s(latency["p50"]), _s(latency["p90"]), _s(latency["p99"]), _n(latency["calls"])),
            *(_n(steps["sequences"]) if ran else "–", _n(steps["tokens"]) if ran else "–"),
            *(_s(steps["seconds"]) if ran else "–", f"{steps['readout_share']:.0%}" if ran else "–"),
            _n(s["submitted_tokens"].get(kind, 0)),
        )
    return table


def _errors(errors: list[dict[str, Any]]) -> Any:
    from rich.text import Text

    if not errors:
        return Text("no errors", style="dim")
    table = _table("time", "client", "call", "error", "detail, request", left=range(5))
    for e in errors[:8]:
        at = time.strftime("%H:%M:%S", time.localtime(e["at"]))
        said = Text(f"{e['detail'] or 'in the log'} ")
        said.append(e["request_id"], style="dim")
        table.add_row(at, Text(e["client"]), f"{e['method']} {e['transport']}", Text(e["reason"], style="red"), said)
    return table


def _bars(values: list[float]) -> str:
    top = max(values) or 1.0
    return "".join(BARS[min(len(BARS) - 1, round(value / top * (len(BARS) - 1)))] for value in values)


def _n(value: float) -> str:
    if value >= 1e6:
        return f"{value / 1e6:.1f}M"
    if value >= 1e4:
        return f"{value / 1e3:.1f}k"
    return f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"


def _s(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _span(seconds: float) -> str:
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
