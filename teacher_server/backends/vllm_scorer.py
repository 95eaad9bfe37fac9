"""Answers questions about prompts while their hidden states pass by, some rows in each step of the engine.

It runs inside a vLLM worker and knows tensors, no engine. A prompt's rows arrive in order, in one step or in several; a
prompt that the engine starts again overwrites what it had. Legend: T scored positions, R rows of a step, H hidden
width, K alternatives.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from protos.scores import Field, ScoreSpec
from teacher_server.backends import packing
from teacher_server.backends.readout import Rows
from teacher_server.backends.stopwatch import Stopwatch
from teacher_server.backends.vllm_wire import FINITE, Question

_STATES_ALONE = frozenset({Field.HIDDEN_STATES})


class Reader(Protocol):
    """`LmHead.read`."""

    def __call__(
        self, states_RH: Tensor, rows: Rows, spec: ScoreSpec, fields: frozenset[Field], *, plain: bool
    ) -> dict[str, Tensor]: ...


@dataclass(frozen=True, eq=False)
class Part:
    """Rows first..last-1 of a prompt's `total` (row 0 is score_start's): hidden states [R,H], next tokens int[R]."""

    name: str
    first: int
    last: int
    total: int
    hidden: Tensor
    targets: Tensor

    def rows(self, first: int, last: int) -> Part:
        """The part's own rows first..last-1."""
        inside = slice(first, last)
        return Part(
            self.name, self.first + first, self.first + last, self.total, self.hidden[inside], self.targets[inside]
        )


@dataclass(eq=False)
class _Prompt:
    """What is known of one prompt's answer; `rows` of it are there."""

    question: Question
    candidates: Tensor | None
    rows: int = 0
    ids: Tensor | None = None
    numbers: Tensor | None = None
    states: Tensor | None = None
    columns: dict[str, slice] = field(default_factory=dict)


Result = tuple[Tensor, Tensor, Tensor]
"""int32[T,K], float32[T,columns] and hidden states [T,H] (or [0]) of one prompt, on the engine's device."""


class PromptScorer:
    """`read` turns hidden states into fields, `chunk` rows at a time."""

    def __init__(self, read: Reader, device: torch.device, chunk: int) -> None:
        self._reader = read
        self._device = device
        self._chunk = chunk
        self._prompts: dict[str, _Prompt] = {}
        self.stopwatch = Stopwatch()
        """Runs while scores are read out."""

    def __contains__(self, name: str) -> bool:
        return name in self._prompts

    def score_start(self, name: str) -> int:
        """The first scored position of a prompt."""
        return self._prompts[name].question.score_start

    @property
    def names(self) -> list[str]:
        """Prompts that have no whole answer yet."""
        return list(self._prompts)

    def add(self, name: str, question: Question) -> None:
        """Begins with a prompt, or begins again."""
        ids = question.candidate_ids
        candidates = None
        if ids is not None:
            candidates = torch.from_numpy(ids.copy()).to(self._device, non_blocking=True)
        self._prompts[name] = _Prompt(question, candidates)

    def remove(self, name: str) -> None:
        """Forgets a prompt; one that is not known is no error."""
        self._prompts.pop(name, None)

    def finish(self, name: str) -> Result | None:
        """The whole answer, and forgets the prompt; None where rows are missing (the engine skipped them)."""
        prompt = self._prompts.pop(name)
        if prompt.ids is None or prompt.numbers is None or prompt.states is None or prompt.rows < len(prompt.numbers):
            return None
        return prompt.ids, prompt.numbers, prompt.states

    @torch.inference_mode()
    def step(self, parts: Iterable[Part]) -> None:
        """Takes the rows of one engine step."""
        groups: dict[Any, list[Part]] = defaultdict(list)
        for part in parts:
            prompt = self._prompts[part.name]
            if prompt.numbers is None:
                self._allocate(prompt, part.total, part.hidden)
            if part.first > prompt.rows:  # rows before these never came: `finish` will say so
                continue
            prompt.rows = part.last
            question = prompt.question
            if prompt.states is not None and len(prompt.states):
                prompt.states[part.first : part.last] = part.hidden
                assert prompt.numbers is not None
                prompt.numbers[part.first : part.last, prompt.columns[FINITE]] = part.hidden.sum(1, True) * 0
            if question.fields != _STATES_ALONE:
                key = (question.spec, question.fields, question.candidates, question.plain)
                groups[key].append(part)
        if not groups:
            return
        self.stopwatch.start(self._device)
        for group in groups.values():
            ranges = ((part, 0, part.last - part.first) for part in group)
            for chunk in packing.chunks(ranges, self._chunk):
                self._read([part.rows(first, last) for part, first, last in chunk])
        self.stopwatch.stop()

    def _allocate(self, prompt: _Prompt, rows: int, hidden: Tensor) -> None:
        question, device = prompt.question, self._device
        first = 0
        for name, width in question.columns:
            prompt.columns[name] = slice(first, first + width)
            first += width
        prompt.ids = torch.empty(rows, question.id_columns, dtype=torch.int32, device=device)
        prompt.numbers = torch.empty(rows, first, dtype=torch.float32, device=device)
        width = hidden.shape[1] if Field.HIDDEN_STATES in question.fields else 0
        prompt.states = torch.empty(rows if width else 0, width, dtype=hidden.dtype, device=device)

    def _read(self, chunk: list[Part]) -> None:
        question = self._prompts[chunk[0].name].question
        states = chunk[0].hidden if len(chunk) == 1 else torch.cat([part.hidden for part in chunk])
        candidates = None
        if question.candidate_ids is not None:
            held = [(self._prompts[part.name].candidates, part) for part in chunk]
            candidates = torch.cat([ids[part.first : part.last] for ids, part in held if ids is not None])
        rows = Rows(torch.cat([part.targets for part in chunk]).long(), candidates)
        result = self._reader(states, rows, question.spec, question.fields, plain=question.plain)
        first = 0
        for part in chunk:
            prompt, last = self._prompts[part.name], first + part.last - part.first
            assert prompt.ids is not None
            assert prompt.numbers is not None
            for name, columns in prompt.columns.items():
                if name == FINITE:
                    continue
                values = result[name][first:last]
                prompt.numbers[part.first : part.last, columns] = values[:, None] if values.ndim == 1 else values
            if question.id_columns:
                prompt.ids[part.first : part.last] = result["top_token_ids"][first:last]
            first = last
