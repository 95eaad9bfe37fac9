"""Log-probabilities in the shapes of OpenAI's completions, OpenAI's chat completions and vLLM's prompt_logprobs.

They are made of scores of the very tokens, so that they equal what Score says. It knows no route.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from protos.scores import Floats, Ids, Scores

Decode = Callable[[Ids], str]


@dataclass(frozen=True)
class Row:
    """One token: its name and text, its log-probability (None for a first token), and alternatives by likelihood."""

    token_id: int
    name: str
    logprob: float | None
    alternatives: tuple[tuple[int, str, float], ...] = ()


class Namer:
    """Names of tokens: their text, or `token_id:N` where that is asked for or the text is no whole character."""

    def __init__(self, decode: Decode, as_ids: bool) -> None:
        self._decode = decode
        self._as_ids = as_ids

    def name(self, ids: Ids, position: int) -> str:
        """The name of `ids[position]`."""
        text = "" if self._as_ids else self._decode(ids[position : position + 1])
        return text if text and "�" not in text else f"token_id:{ids[position]}"


def rows(ids: Ids, first: int, scores: Scores | None, start: int, top_k: int, namer: Namer) -> list[Row]:
    """Rows of int32[N] `ids` from position `first` on; `scores` begin at position `start`, what is before has none."""
    result = []
    for position in range(first, len(ids)):
        row = position - start
        if scores is None or row < 0 or scores.token_logprobs is None:
            result.append(Row(int(ids[position]), namer.name(ids, position), None))
            continue
        alternatives: list[tuple[int, str, float]] = []
        if scores.top_token_ids is not None and scores.top_logprobs is not None:
            top, logprobs = scores.top_token_ids[row], scores.top_logprobs[row]
            alternatives = [(int(top[k]), namer.name(top, k), float(logprobs[k])) for k in range(top_k)]
        logprob = float(scores.token_logprobs[row])
        result.append(Row(int(ids[position]), namer.name(ids, position), logprob, tuple(alternatives)))
    return result


def sampled_rows(ids: Ids, logprobs: Floats | None, namer: Namer) -> list[Row]:
    """Rows of int32[R] sampled tokens with their float32[R] log-probabilities, without alternatives."""
    given: Sequence[float | None] = [None] * len(ids) if logprobs is None else logprobs.tolist()
    return [Row(int(ids[i]), namer.name(ids, i), given[i]) for i in range(len(ids))]


def completion_shape(rows: list[Row], top_k: int, offset: int = 0) -> dict[str, Any]:
    """`logprobs` of a text completion; the token itself is among its alternatives, as OpenAI and vLLM have it."""
    offsets = []
    for row in rows:
        offsets.append(offset)
        offset += len(row.name)
    top: list[dict[str, float] | None] | None = None
    if top_k:
        top = []
        for row in rows:
            if row.logprob is None:
                top.append(None)
                continue
            top.append({name: logprob for _, name, logprob in row.alternatives} | {row.name: row.logprob})
    return {
        "tokens": [row.name for row in rows],
        "token_logprobs": [row.logprob for row in rows],
        "top_logprobs": top,
        "text_offset": offsets,
    }


def chat_shape(rows: list[Row]) -> dict[str, Any]:
    """`logprobs` of a chat completion."""

    def entry(name: str, logprob: float | None) -> dict[str, Any]:
        return {"token": name, "logprob": logprob, "bytes": list(name.encode())}

    return {
        "content": [
            entry(row.name, row.logprob)
            | {"top_logprobs": [entry(name, logprob) for _, name, logprob in row.alternatives]}
            for row in rows
        ]
    }


def prompt_shape(rows: list[Row]) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: by token id; `rank` is null for a token outside the alternatives."""
    result: list[dict[str, Any] | None] = []
    for row in rows:
        if row.logprob is None:
            result.append(None)
            continue
        entries: dict[str, Any] = {str(row.token_id): {"logprob": row.logprob, "rank": None, "decoded_token": row.name}}
        for rank, (token_id, name, logprob) in enumerate(row.alternatives, 1):
            entries[str(token_id)] = {"logprob": logprob, "rank": rank, "decoded_token": name}
        result.append(entries)
    return result
