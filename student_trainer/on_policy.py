"""Stage 2, on-policy: the student samples, the teacher scores those very tokens, and the student minimises a
divergence on them.

One optimizer step: draw prompts and their modes, sample one completion for each, send all of them to the teacher at
once, and train on the first micro-batch as soon as its scores are there, while the teacher scores the others. The
default is the reverse KL over the teacher's top K and the tail. Knows no transport and no training loop.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from protos.scores import Floats, Ids, Mode, ids_array

from . import distributed, packing
from .batches import Row, completion_ids, cut
from .checkpoints import on_policy_layout
from .config import Config
from .data import Example
from .distillation_trainer import MicroBatch
from .errors import UserError
from .evaluation import Student, requests_for, rollout_row
from .losses import Head, Targets, student_top_k
from .modes import assign_modes
from .packing import forward_inputs
from .responses import Request
from .rollouts import Rollout, sample
from .sharding import whole
from .stage import Outcome, Session, begin, train
from .stage_loss import StageLoss
from .teachers import Pending, Teachers

log = logging.getLogger(__name__)


def distil(session: Session, student: Student) -> Outcome:
    """Trains `student` on its own completions."""
    started, options = time.monotonic(), session.config.policy_distillation
    layout = on_policy_layout(session.config.training.output_dir)
    checkpoint = begin(session, layout)
    loss = StageLoss.on_policy(options, session.teachers.normalized_size, session.teachers.head)
    feed = RolloutFeed(session.config, session.train, student, session.teachers, loss)
    measured = train(session, layout, options, student, feed, loss, checkpoint, "stage 2, on-policy")
    return Outcome(layout.best_model, measured, time.monotonic() - started)


class Asked(NamedTuple):
    """A rollout that its teacher is scoring: `candidates` int32[R,K] are the ids that the teacher was asked about,
    `logprobs` float32[R] the sampler's.
    """

    row: Row
    candidates: Ids | None
    logprobs: Floats | None
    score: Pending


class RolloutFeed:
    """Micro-batches of fresh rollouts; all scores of a step are asked for before the first of them trains."""

    ahead = 0

    def __init__(
        self, config: Config, examples: Sequence[Example], student: Student, teachers: Teachers, loss: StageLoss
    ) -> None:
        self.config, self.options = config, config.policy_distillation
        self.student, self.teachers, self.loss = student, teachers, loss
        tokenizer, max_length = student.tokenizer, config.data.max_length
        both = requests_for(tokenizer, [(e, mode) for e in examples for mode in Mode], max_length)
        self._requests = {(r.example_id, r.mode): r for r in both}
        self.examples = [e for e in examples if all((e.id, mode) in self._requests for mode in Mode)]
        if not self.examples:
            raise UserError("every prompt is longer than data.max_length", "data.max_length", "raise it")

    def __len__(self) -> int:
        return len(self.examples)

    def lengths(self) -> list[int]:
        """All alike, because what a prompt's completion takes is not known before it is sampled."""
        return [1] * len(self.examples)

    def announce(self, indices: Sequence[int]) -> None:
        """Nothing: what the next step samples depends on this step's weights."""

    def step(self, micro_batches: Sequence[Sequence[int]], step: int, epoch: int) -> list[MicroBatch]:
        """Samples, asks, and gives as many micro-batches as there were, each of rollouts of similar length, short
        first.

        Non-thinking rollouts are short: they are sampled first, and scored while the thinking ones are sampled.
        """
        examples = [self.examples[i] for indices in micro_batches for i in indices]
        modes = assign_modes(examples, self.options.thinking_prob, self.config.training.seed + epoch)
        requests = [self._requests[e.id, mode] for e, mode in zip(examples, modes, strict=True)]
        asked: list[Asked] = []
        with whole(self.student.model):
            for mode in (Mode.NON_THINKING, Mode.THINKING):
                rollouts = self._sample([r for r in requests if r.mode is mode], step, mode)
                rollouts.sort(key=lambda r: len(r[0].ids))
                for first in range(0, len(rollouts), self.options.batch_size):
                    asked += self._ask(rollouts[first : first + self.options.batch_size])
        lengths = [len(a.row.ids) for a in asked]
        parts = cut(lengths, len(micro_batches), packed=packing.packs(self.student.model))
        return [self._batch([asked[i] for i in part]) for part in reversed(parts)]

    def _sample(self, requests: Sequence[Request], step: int, mode: Mode) -> list[tuple[Row, Rollout]]:
        """One rollout of each request."""
        options, seed = self.options, (self.config.training.seed, step, distributed.rank(), mode.thinking)
        if not requests:
            return []
        rollouts = sample(
            self.student.model,
            [r.prompt_ids for r in requests],
            max_new_tokens=options.max_new_tokens,
            temperature=options.sampling_temperature or options.temperature,
            max_length=self.config.data.max_length,
            seed=hash(seed) % 2**63,
            logprobs=self.weighs,
            **self.student.sampling,
        )
        return [(rollout_row(r, request), r) for r, request in zip(rollouts, requests, strict=True)]

    @property
    def weighs(self) -> bool:
        """Whether the loss weighs tokens by how likely they were when sampled: only at another temperature."""
        other = self.options.sampling_temperature not in (None, self.options.temperature)
        return other and self.loss.objective.on_sampled_token

    def _ask(self, rollouts: Sequence[tuple[Row, Rollout]]) -> list[Asked]:
        """Sends rollouts to their teachers, with the student's own top K where the loss wants that."""
        rows = [row for row, _ in rollouts]
        candidates: list[Ids | None] = [None] * len(rows)
        if self.loss.on_student_support:
            bounds = np.cumsum([len(row.ids) - row.start for row in rows])[:-1]
            candidates = list(np.split(self._own_top_k(rows), bounds))
        scores = self.teachers.submit_score(rows, self.loss.spec, candidates)
        return [Asked(row, candidates[i], rollout.logprobs, scores[i]) for i, (row, rollout) in enumerate(rollouts)]

    def _batch(self, asked: Sequence[Asked]) -> MicroBatch:
        rows = [a.row for a in asked]
        tokens = completion_ids(rows)
        drawn = [a.logprobs for a in asked if a.logprobs is not None]

        def targets() -> Targets:
            scores = [a.score.result() for a in asked]
            named = [a.candidates for a in asked if a.candidates is not None]
            candidates = np.concatenate(named).astype(np.int64) if named else None
            return self.loss.targets(tokens, scores, self.loss.spec.temperatures, candidates)

        return MicroBatch(rows, targets, torch.from_numpy(np.concatenate(drawn)) if drawn else None)

    def _own_top_k(self, rows: Sequence[Row]) -> Ids:
        """int32[N,K]: the student's most likely ids at each completion token, chosen without looking at the token."""
        model, pad_id = self.student.model, self.student.tokenizer.pad_token_id
        inputs = forward_inputs(model, rows, pad_id, next(model.parameters()).device)

        def choose(hidden: torch.Tensor, head: Any) -> torch.Tensor:
            return student_top_k(
                hidden, Head(head.weight, getattr(head, "bias", None), self.loss.vocab_size), self.loss.top_k
            )

        with torch.no_grad():
            ids = model(**inputs, objective=choose)
        return ids_array(ids.cpu().numpy(), 2)
