"""Log-probabilities in the shapes of OpenAI's completions, OpenAI's chat completions and vLLM's prompt_logprobs.

It knows arrays of scores and a decoder of ids, no route. Legend: R tokens, K alternatives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from protos.scores import Floats, Ids, Scores
from teacher_server.backends.base import TextCodec


@dataclass(frozen=True)
class Token:
    """A token's id, its name in an answer, and the bytes of its text where that is whole characters."""

    token_id: int
    name: str
    bytes: list[int] | None


@dataclass(frozen=True)
class Row:
    """One token: its log-probability (None for a first token), and alternatives by likelihood."""

    token: Token
    logprob: float | None
    alternatives: tuple[tuple[Token, float], ...] = ()


class Namer:
    """Names tokens: by their text, or `token_id:N` where that is asked for or the text is no whole character."""

    def __init__(self, text: TextCodec, as_ids: bool) -> None:
        self._text = text
        self._as_ids = as_ids
        self._known: dict[int, Token] = {}

    def tokens(self, ids: Ids) -> list[Token]:
        """The tokens of int32[R]."""
        return [
            self._known.get(token_id) or self._make(token_id, ids[i : i + 1]) for i, token_id in enumerate(ids.tolist())
        ]

    def _make(self, token_id: int, one: Ids) -> Token:
        text = self._text.decode(one, special=True)
        whole = bool(text) and "�" not in text
        name = text if whole and not self._as_ids else f"token_id:{token_id}"
        self._known[token_id] = Token(token_id, name, list(text.encode()) if whole else None)
        return self._known[token_id]


def rows(
    ids: Ids, logprobs: Floats | None, top_ids: Ids | None, top_logprobs: Floats | None, namer: Namer
) -> list[Row]:
    """Rows of int32[R] with their float32[R], and alternatives int32[R,K] and float32[R,K] where there are some."""
    tokens = namer.tokens(ids)
    given: list[float | None] = [None] * len(ids) if logprobs is None else logprobs.tolist()
    if top_ids is None or top_logprobs is None:
        return [Row(token, logprob) for token, logprob in zip(tokens, given, strict=True)]
    return [
        Row(tokens[i], given[i], tuple(zip(namer.tokens(top_ids[i]), top_logprobs[i].tolist(), strict=True)))
        for i in range(len(ids))
    ]


def prompt_rows(ids: Ids, scores: Scores | None, namer: Namer) -> list[Row]:
    """Rows of a prompt int32[R], whose first token has no log-probability; `scores` are those of the others."""
    found = scores or Scores()
    first = rows(ids[:1], None, None, None, namer)
    return first + rows(ids[1:], found.token_logprobs, found.top_token_ids, found.top_logprobs, namer)


def completion_shape(rows: list[Row], top_k: int, offset: int = 0) -> dict[str, Any]:
    """`logprobs` of a text completion; the token itself is among its alternatives, as OpenAI and vLLM have it."""
    offsets = []
    top: list[dict[str, float] | None] = []
    for row in rows:
        offsets.append(offset)
        offset += len(row.token.name)
        if row.logprob is None:
            top.append(None)
        else:
            some = {token.name: logprob for token, logprob in row.alternatives[:top_k]}
            top.append(some | {row.token.name: row.logprob})
    return {
        "tokens": [row.token.name for row in rows],
        "token_logprobs": [row.logprob for row in rows],
        "top_logprobs": top,
        "text_offset": offsets,
    }


def chat_shape(rows: list[Row], top_k: int) -> dict[str, Any]:
    """`logprobs` of a chat completion."""

    def entry(token: Token, logprob: float | None) -> dict[str, Any]:
        return {"token": token.name, "logprob": logprob, "bytes": token.bytes}

    return {
        "content": [
            entry(row.token, row.logprob)
            | {"top_logprobs": [entry(token, logprob) for token, logprob in row.alternatives[:top_k]]}
            for row in rows
        ]
    }


def prompt_shape(rows: list[Row], top_k: int) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`, by token id.

    The rank of a token outside the alternatives is the smallest that it can have, `top_k` + 1; null without any.
    """
    result: list[dict[str, Any] | None] = []
    for row in rows:
        if row.logprob is None:
            result.append(None)
            continue
        outside = top_k + 1 if top_k else None
        own = {"logprob": row.logprob, "rank": outside, "decoded_token": row.token.name}
        entries: dict[str, Any] = {str(row.token.token_id): own}
        for rank, (token, logprob) in enumerate(row.alternatives[:top_k], 1):
            entries[str(token.token_id)] = {"logprob": logprob, "rank": rank, "decoded_token": token.name}
        result.append(entries)
    return result
