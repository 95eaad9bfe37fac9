"""Measures models on held-out problems: accuracy in both modes, and how far the student is from the teacher.

Two sets, both fixed for a run: the teacher's answers to the validation problems (asked for once, kept below
`output_dir/evaluation`, scored once) give loss, forward KL, reverse KL and tail share; the student's own answers give
accuracy, length and how many finish, and, sampled, its on-policy divergence. Knows models, the teacher client and
verifiers, no training.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from protos.scores import FinishReason, Ids, Mode, Sampling, Scores, ScoreSpec

from . import distributed
from .batches import Row, completion_ids, completion_tokens
from .config import Config
from .data import Example
from .modes import render_all
from .packing import forward_inputs
from .reporting import Reporter
from .responses import Request, Response, collect, fitting
from .rollouts import Rollout, RolloutEngine, in_order
from .row_scores import RowScores
from .score_store import Wait
from .sharding import whole
from .stage_loss import METRICS, StageLoss
from .teachers import Teachers
from .verifiers import Verifier

log = logging.getLogger(__name__)

T = TypeVar("T")
Scored = tuple[Sequence[Row], list[Scores]]

DIVERGENCE_ROWS = 256
"""Answers for each mode on which losses and divergences are measured."""
SAMPLED_ROWS = 64
"""Rollouts for each mode on which the on-policy divergence is measured."""


@dataclass(frozen=True)
class Measurement:
    """Numbers by name, and sample outputs as (mode, problem, answer)."""

    values: dict[str, float]
    samples: list[tuple[str, str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Student:
    """A model, its tokenizer, and the engine that samples from it."""

    model: Any
    tokenizer: Any
    engine: RolloutEngine


def requests_for(tokenizer: Any, pairs: Sequence[tuple[Example, Mode]], max_length: int) -> list[Request]:
    """What to ask for each example in its mode; prompts that leave no room for an answer are left out, with a line."""
    rendered = render_all(tokenizer, [(e.messages, mode) for e, mode in pairs])
    kept = [
        Request(e.id, e.messages, mode, ids, e.expected, e.domain, e.metadata)
        for (e, mode), ids in zip(pairs, rendered, strict=True)
        if len(ids) < max_length
    ]
    if len(kept) < len(rendered):
        left = len(rendered) - len(kept)
        log.warning(
            "left out %d of %d prompts, they have data.max_length = %d tokens or more", left, len(rendered), max_length
        )
    return kept


def example_of(request: Request) -> Example:
    """The example that a request came from, as verifiers want it."""
    return Example(request.example_id, request.messages, request.expected, request.domain, request.metadata)


Answer = tuple[Request, str, int, bool]
"""A problem, the text of an answer, its number of tokens, and whether it ended by itself."""


Part = tuple[Mode, str | None]
"""A mode and a domain."""


def by_name(parts: Collection[Part]) -> dict[str, list[Part]]:
    """Which of `parts` the metrics of a name are about: those of a mode, and of a domain where there are several."""
    names = {mode.value: [p for p in parts if p[0] is mode] for mode in Mode}
    domains = {domain for _, domain in parts}
    if len(domains) > 1:
        names |= {d: [p for p in parts if p[1] == d] for d in sorted(d for d in domains if d is not None)}
    return {name: chosen for name, chosen in names.items() if chosen}


def accuracy(verifier: Verifier | None, answers: Sequence[Answer]) -> dict[str, float]:
    """Accuracy (where there is a verifier), mean length and share that ended, by mode and by domain (see `by_name`)."""
    table: dict[Part, list[tuple[float, ...]]] = {}
    for request, text, length, ended in answers:
        right = () if verifier is None else (float(verifier(text, example_of(request))),)
        table.setdefault((request.mode, request.domain), []).append((length, ended, *right))
    values: dict[str, float] = {}
    for name, parts in by_name(table).items():
        columns = zip(*(row for part in parts for row in table[part]), strict=True)
        means = [sum(column) / len(column) for column in columns]
        values |= {f"{k}_{name}": v for k, v in zip(("completion_tokens", "finished", "accuracy"), means, strict=False)}
    return values


class Answering:
    """Problems that a student answers: what `requests` ask, in their modes, judged by `verifier`."""

    def __init__(self, config: Config, requests: Sequence[Request], verifier: Verifier | None) -> None:
        self.config, self.requests, self.verifier = config, requests, verifier
        self.max_length = config.data.max_length

    def answered_by(self, student: Student) -> tuple[dict[str, float], list[tuple[str, str, str]]]:
        """(`accuracy` of a student in evaluation mode, sample outputs), over all processes."""
        options = self.config.evaluation
        table: list[Answer] = []
        shown: list[tuple[str, str, str]] = []
        for mode in Mode:
            requests = self._mine([r for r in self.requests if r.mode is mode])
            rollouts = self._sample(student, requests, options.max_new_tokens, options.temperature)
            texts = [answer_text(student.tokenizer, r) for r in rollouts]
            for request, rollout, text in zip(requests, rollouts, texts, strict=True):
                table.append((request, text, len(rollout.completion_ids), rollout.finish_reason is FinishReason.STOP))
            pairs = list(zip(requests, texts, strict=True))[: options.show]
            shown += [(mode.value, r.messages[-1].content, text) for r, text in pairs]
        table = [entry for part in distributed.gather(table) for entry in part]
        return accuracy(self.verifier, table), shown

    def _mine(self, items: Sequence[T]) -> Sequence[T]:
        """This process's share."""
        return items[distributed.rank() :: distributed.world()]

    def _sample(self, student: Student, requests: Sequence[Request], tokens: int, temperature: float) -> list[Rollout]:
        student.engine.update_weights()
        return in_order(
            student.engine,
            [r.prompt_ids for r in requests],
            rows=self.config.evaluation.batch_size,
            max_new_tokens=tokens,
            temperature=temperature,
            max_length=self.max_length,
            seed=self.config.training.seed,
            names=[r.example_id for r in requests],
        )


class Evaluator(Answering):
    """The held-out problems of a run and the teacher's answers to them."""

    def __init__(
        self,
        config: Config,
        teachers: Teachers,
        tokenizer: Any,
        validation: Sequence[Example],
        verifier: Verifier | None,
        reporter: Reporter,
    ) -> None:
        options = config.evaluation
        pairs = [(e, mode) for e in validation[: options.problems] for mode in teachers.modes_of(e.domain)]
        super().__init__(config, requests_for(tokenizer, pairs, config.data.max_length), verifier)
        self.teachers, self.reporter = teachers, reporter
        sampling = Sampling(options.max_new_tokens, options.temperature, seed=config.training.seed)
        name = hashlib.blake2b(f"{teachers.identity} {sampling}".encode(), digest_size=6).hexdigest()
        folder = Path(config.training.output_dir) / "evaluation" / name
        started = time.monotonic()
        self.answers = distributed.on_main(lambda: self._ask(sampling, folder)) if self.requests else []
        self.teacher_seconds = time.monotonic() - started
        first, second = config.non_policy_distillation, config.policy_distillation
        self.plain = StageLoss.plain(teachers.normalized_size, max(first.top_k, second.top_k), teachers.head)
        self.temperatures = tuple(sorted({1.0, first.temperature, second.temperature}))
        spec = self.plain.spec if teachers.head else ScoreSpec(self.plain.top_k, self.temperatures)
        self.store = RowScores(teachers, spec, folder / "scores", distributed.rank())
        fitted, _ = fitting(self.answers, self.max_length)
        few = [r for mode in Mode for r in [a for a in fitted if a.mode is mode][:DIVERGENCE_ROWS]]
        by_length = sorted(few, key=lambda r: len(r.ids))
        self.rows_of: dict[Part, list[Row]] = {}
        for response in by_length:
            self.rows_of.setdefault((response.mode, response.domain), []).append(response_row(response))
        self.rows = [row for rows in self.rows_of.values() for row in rows]

    def _ask(self, sampling: Sampling, folder: Path) -> list[Response]:
        with self.reporter.progress("teacher answers held-out problems", len(self.requests)) as update:
            return collect(
                self.teachers,
                self.requests,
                sampling,
                folder / "answers.parquet",
                progress=lambda done, total, tokens: update(done, f"{tokens} tokens"),
            )

    def teacher(self) -> Measurement:
        """The teacher's own row: its accuracy, and the tail share on its answers at temperature 1."""
        if not self.answers:
            return Measurement({})
        stopped = FinishReason.STOP
        answers = [(a, a.text, len(a.completion_ids), a.finish_reason is stopped) for a in self.answers]
        values = accuracy(self.verifier, answers)
        share = 0.0  # of a whole distribution nothing is outside
        if self.plain.teacher is None:
            scores = self.store.request(self._mine(self.rows))()
            one = self.temperatures.index(1.0)
            tails = [np.exp(s.tail_logprob[:, one], dtype=np.float64) for s in scores if s.tail_logprob is not None]
            parts = distributed.gather((sum(float(t.sum()) for t in tails), sum(len(t) for t in tails)))
            share = sum(part for part, _ in parts) / max(sum(count for _, count in parts), 1)
        values |= {"forward_kl": 0.0, "reverse_kl": 0.0, "tail_share": share, "seconds": self.teacher_seconds}
        return Measurement(values)

    def student(self, student: Student, loss: StageLoss, *, on_policy: bool) -> Measurement | None:
        """Everything about a student, or None where there is nothing held out.

        `forward_kl`, `reverse_kl`, `tail_share` and `cross_entropy` are on the teacher's answers at temperature 1.
        `loss` is the stage's: on the teacher's answers off-policy, on rollouts of the student on-policy, where
        own_forward_kl and own_reverse_kl are the divergences on these at the stage's temperature. Names that end in a
        mode or a domain are on its answers alone.
        """
        if not self.requests:
            return None
        started = time.monotonic()
        training = student.model.training
        student.model.eval()
        with whole(student.model):
            values, samples = self.answered_by(student)
            values |= self._on_teacher_answers(student, loss.measured(self.plain))
            if on_policy:
                values |= self._on_rollouts(student, loss.measured(self.plain))
        student.model.train(training)
        return Measurement({**values, "seconds": time.monotonic() - started}, samples)

    def _on_teacher_answers(self, student: Student, loss: StageLoss) -> dict[str, float]:
        losses, values = (self.plain, loss), dict[str, float]()
        found = {
            part: self._sums(student, losses, self._scored(self.store, self._mine(rows)))
            for part, rows in self.rows_of.items()
        }
        for name, parts in by_name(found).items():
            divergences = _means(*_total([found[p] for p in parts]))[0].items()
            values |= {f"{k}_{name}": v for k, v in divergences if k in ("forward_kl", "reverse_kl")}
        plain, own = _means(*_total(list(found.values()))) if found else ({}, {})
        return {**values, **plain, **{k: v for k, v in own.items() if k in ("loss", "soft_loss")}}

    def _on_rollouts(self, student: Student, loss: StageLoss) -> dict[str, float]:
        requests = [r for mode in Mode for r in [q for q in self.requests if q.mode is mode][:SAMPLED_ROWS]]
        options = self.config.policy_distillation
        temperature = options.sampling_temperature or options.temperature
        mine = self._mine(requests)
        rollouts = self._sample(student, mine, options.max_new_tokens, temperature)
        rows = sorted((rollout_row(r, q) for r, q in zip(rollouts, mine, strict=True)), key=lambda r: len(r.ids))
        store = RowScores(self.teachers, self.store.spec)
        (values,) = _means(*self._sums(student, (loss,), self._scored(store, rows)))
        return {
            k if k == "loss" else f"own_{k}": v for k, v in values.items() if k in ("loss", "forward_kl", "reverse_kl")
        }

    def _scored(self, store: RowScores, rows: Sequence[Row]) -> Iterator[Scored]:
        """Batches of `rows` with their scores; hidden states are asked for one batch ahead, others all at once."""
        size = self.config.evaluation.batch_size
        parts = [rows[first : first + size] for first in range(0, len(rows), size)]
        ahead = 1 if self.plain.teacher is not None else len(parts)
        waits: deque[Wait] = deque()
        for place, part in enumerate(parts):
            waits += [store.request(p) for p in parts[place + len(waits) : place + 1 + ahead]]
            yield part, waits.popleft()()

    def _sums(
        self, student: Student, losses: Sequence[StageLoss], batches: Iterable[Scored]
    ) -> tuple[torch.Tensor, int]:
        """float64[losses, METRICS] sums over the completion tokens of `batches`, and their number, over all
        processes.
        """
        sums, tokens = torch.zeros((len(losses), len(METRICS)), dtype=torch.float64), 0
        device = next(student.model.parameters()).device
        for rows, scores in batches:
            inputs = forward_inputs(student.model, rows, student.tokenizer.pad_token_id, device)
            for i, loss in enumerate(losses):
                targets = loss.targets(completion_ids(rows), scores, self.temperatures).to(device)
                with torch.no_grad():
                    _, found = student.model(**inputs, objective=loss.on(targets))
                sums[i] += found.double().cpu()
            tokens += completion_tokens(rows)
        parts = distributed.gather((sums, tokens))
        return _total(parts)

    def close(self) -> None:
        """Keeps the scores that have arrived."""
        self.store.close()


def _total(parts: Sequence[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, int]:
    return torch.stack([sums for sums, _ in parts]).sum(0), sum(tokens for _, tokens in parts)


def _means(sums: torch.Tensor, tokens: int) -> list[dict[str, float]]:
    """METRICS of each loss as means; empty where there are no tokens."""
    return [dict(zip(METRICS, row, strict=True)) if tokens else {} for row in (sums / max(tokens, 1)).tolist()]


def response_row(response: Response) -> Row:
    """A response as a sequence to score and learn from."""
    return _row(response, response.completion_ids)


def _row(request: Request, completion: Ids) -> Row:
    name = f"{request.example_id} ({request.mode.value})"
    ids = np.concatenate([request.prompt_ids, completion])
    return Row(ids, len(request.prompt_ids), name, request.mode, request.domain)


def answer_text(tokenizer: Any, rollout: Rollout) -> str:
    """The text of a completion as the teacher's is: without special tokens, with think tags."""
    return str(tokenizer.decode(rollout.completion_ids, skip_special_tokens=True))


def rollout_row(rollout: Rollout, request: Request) -> Row:
    """A rollout of `request` as a sequence to score and learn from."""
    return _row(request, rollout.completion_ids)
