"""`python -m teacher_server score`: what a teacher thinks of a text, token by token.

The teacher tokenizes; nothing is needed here but its HTTP address.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from teacher_server.commands.remote import Place, Remote, RemoteError, parser_of, run

MOST_SHOWN = 20


def main(arguments: Sequence[str]) -> int:
    """Runs the command."""
    parser = parser_of("score", "Scores texts and shows each token's log-probability and what was likelier.")
    parser.add_argument("--text", action="append", default=[], help="A text; may be given again [default: stdin].")
    parser.add_argument("--ids", action="append", default=[], metavar="1,2,3", help="Token ids in place of a text.")
    parser.add_argument("--top-k", type=int, default=5, metavar="K", help="Alternatives to show [default: 5].")
    parser.add_argument("--json", action="store_true", help="Print the teacher's answer as it is.")
    return run(parser, arguments, _score)


def _score(options: Any, place: Place) -> int:
    if not 0 <= options.top_k <= MOST_SHOWN and not options.json:
        raise RemoteError(f"--top-k must be 0 to {MOST_SHOWN}, or more with --json, got {options.top_k}")
    sequences: list[Any] = [*options.text, *map(_ids, options.ids)]
    if not sequences:
        if sys.stdin.isatty():
            raise RemoteError("give a text with --text, or pipe one in")
        sequences = [sys.stdin.read().rstrip("\n")]
    with Remote(place) as remote:
        answer = remote.json("POST", "/v1/score", {"sequences": sequences, "top_k": options.top_k})
    if options.json:
        print(json.dumps(answer, ensure_ascii=False))
        return 0
    for one in answer["sequences"]:
        _show(one)
    return 0


def _ids(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError as error:
        raise RemoteError(f"--ids must be whole numbers with commas between, got {text!r}") from error


def _show(one: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name, justify in (("at", "right"), ("id", "right"), ("token", "left"), ("logprob", "right"), ("p", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    table.add_column("likeliest" if one.get("top_tokens") else "")
    start = one["score_start"]
    for at, (token, token_id) in enumerate(zip(one["tokens"], one["token_ids"], strict=True)):
        cells: list[Any] = [str(at), str(token_id), Text(repr(token)[1:-1])]
        if at < start:
            table.add_row(*cells, "", "", "", style="dim")
            continue
        t = at - start
        logprob, found = one["token_logprobs"][t], Text()
        if one.get("top_tokens"):
            for name, i, other in zip(
                *(one[k][t] for k in ("top_tokens", "top_token_ids", "top_logprobs")), strict=True
            ):
                found.append(f"{repr(name)[1:-1]}", style="bold" if i == token_id else "")
                found.append(f" {math.exp(other):.3f}   ", style="dim")
        table.add_row(*cells, f"{logprob:.3f}", f"{math.exp(logprob):.3f}", found)
    console = Console()
    console.print(table)
    logprobs = one["token_logprobs"]
    if logprobs:
        mean = sum(logprobs) / len(logprobs)
        console.print(
            f"{len(logprobs)} tokens scored, {sum(logprobs):.3f} nats, {mean:.3f} a token, perplexity "
            f"{math.exp(-mean):.2f}",
            highlight=False,
        )
