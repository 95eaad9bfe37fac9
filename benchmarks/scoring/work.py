"""What is asked of a teacher in one row of the table, and the random sequences that carry it. Knows no engine.

Legend: N tokens of a sequence, T scored positions, C candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from protos.scores import Field, Ids, ScoreSpec, Sequence, TeacherInfo


class Skipped(Exception):
    """A row that this machine or this teacher cannot measure; the text says why."""


@dataclass(frozen=True)
class Kind:
    """One kind of question: what it asks for, and the fields without which it would be another question."""

    name: str
    top_k: int = 0
    candidates: int = 0
    temperatures: tuple[float, ...] = (1.0,)
    needs: tuple[str, ...] = ("TOP",)
    alone: bool = False
    """Whether nothing beside `needs` is asked for; else everything that the teacher offers for these arguments."""

    def spec(self, info: TeacherInfo) -> ScoreSpec:
        """The question to this teacher; Skipped where it does not offer what the question is about."""
        needed = frozenset(Field.__members__[name] for name in self.needs if name in Field.__members__)
        if len(needed) < len(self.needs) or needed - info.fields:
            raise Skipped(f"not offered by this teacher: {', '.join(self.needs).lower()}")
        want = needed
        if not self.alone:
            want = ScoreSpec(self.top_k, self.temperatures).fields(self.candidates) & info.fields | needed
        return ScoreSpec(self.top_k, self.temperatures, want)


TOP_64 = Kind("top-64", top_k=64)
KINDS = {
    kind.name: kind
    for kind in (
        TOP_64,
        Kind("top-1", top_k=1),
        Kind("top-64, 64 candidates", top_k=64, candidates=64, needs=("TOP", "CANDIDATE_LOGPROBS")),
        Kind(
            "top-64, temperatures 1 and 2",
            top_k=64,
            temperatures=(1.0, 2.0),
            needs=("TOP", "LOG_NORMALIZER", "TAIL_LOGPROB"),
        ),
        Kind("hidden states", needs=("HIDDEN_STATES",), alone=True),
    )
}


@dataclass(frozen=True)
class Load:
    """How sequences look: N tokens each, scored from `score_start`, `per_call` of them in a call, ids below `vocab`."""

    tokens: int
    score_start: int
    per_call: int
    vocab: int

    def ids(self, seed: int, count: int) -> list[Ids]:
        """`count` random int32[N]; other seeds give other sequences."""
        drawn = np.random.default_rng(seed).integers(0, self.vocab, (count, self.tokens), dtype=np.int32)
        return list(drawn)

    def sequences(self, seed: int, count: int, candidates: int) -> list[Sequence]:
        """`count` random sequences, with C distinct random-looking candidates at each position if `candidates` > 0."""
        return [
            Sequence(ids, self.score_start, self._candidates(seed + index, candidates) if candidates else None)
            for index, ids in enumerate(self.ids(seed, count))
        ]

    def _candidates(self, seed: int, candidates: int) -> Ids:
        first = np.random.default_rng(seed).integers(0, self.vocab, (self.tokens - self.score_start, 1))
        step = max(1, self.vocab // candidates)
        found: Ids = ((first + step * np.arange(candidates)) % self.vocab).astype(np.int32)
        return found

    @property
    def call_tokens(self) -> int:
        """Tokens of one call."""
        return self.tokens * self.per_call


@dataclass(frozen=True)
class Row:
    """One line of the table: a kind of question over one path, from so many client processes."""

    kind: str
    path: str
    clients: int
    parts: frozenset[str]
    """Names by which --only chooses this row."""


PREFILL = "prefill only"
GRPC, HTTP, VLLM_HTTP, IN_PROCESS = "gRPC", "HTTP protobuf", "vLLM's HTTP JSON", "in process"
PARTS = ("prefill", "headline", "wire", "clients", "grpc", "http", "vllm-http")


def teacher_rows(clients: list[int]) -> list[Row]:
    """The rows of our server, the most important ones first; the first of `clients` is the usual number."""
    usual, *others = clients
    kinds = [name for name in KINDS if name != TOP_64.name]
    return [
        Row(TOP_64.name, GRPC, usual, frozenset({"headline", "grpc", "clients"})),
        *(Row(TOP_64.name, GRPC, count, frozenset({"clients"})) for count in others),
        *(Row(name, GRPC, usual, frozenset({"grpc"})) for name in kinds),
        Row(TOP_64.name, HTTP, usual, frozenset({"http"})),
        *(Row(name, HTTP, usual, frozenset({"http"})) for name in kinds),
    ]
