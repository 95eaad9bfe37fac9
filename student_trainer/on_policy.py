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
from typing import Any

import numpy as np
import torch

from protos.scores import Mode

from . import distributed
from .batches import Row, pad, split_by_length
from .checkpoints import on_policy_layout
from .config import Config
from .data import Example
from .distillation_trainer import MicroBatch
from .errors import UserError
from .evaluation import Student, requests_for, rollout_row
from .losses import Head, student_top_k
from .modes import assign_modes
from .responses import Request
from .rollouts import Rollout, sample
from .stage import Outcome, Session, begin, train
from .stage_loss import StageLoss
from .teacher_client import TeacherClient

log = logging.getLogger(__name__)


def distil(session: Session, student: Student) -> Outcome:
    """Trains `student` on its own completions."""
    started, options = time.monotonic(), session.config.policy_distillation
    layout = on_policy_layout(session.config.training.output_dir)
    checkpoint = begin(session, layout)
    loss = StageLoss.on_policy(options, session.info.normalized_size)
    feed = RolloutFeed(session.config, session.train, student, session.client, loss)
    measured = train(session, layout, options, student, feed, loss, checkpoint, "stage 2, on-policy")
    return Outcome(layout.best_model, measured, time.monotonic() - started)


class RolloutFeed:
    """Micro-batches of fresh rollouts; all scores of a step are asked for before the first of them trains."""

    ahead = 0

    def __init__(
        self, config: Config, examples: Sequence[Example], student: Student, client: TeacherClient, loss: StageLoss
    ) -> None:
        self.config, self.options = config, config.policy_distillation
        self.student, self.client, self.loss = student, client, loss
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
        """Samples, asks, and gives as many micro-batches as there were, each of rollouts of similar length."""
        examples = [self.examples[i] for indices in micro_batches for i in indices]
        modes = assign_modes(examples, self.options.thinking_prob, self.config.training.seed + epoch)
        requests = [self._requests[e.id, mode] for e, mode in zip(examples, modes, strict=True)]
        rollouts = self._sample(requests, step)
        parts = split_by_length([len(row.ids) for row, _ in rollouts], len(micro_batches))
        return [self._batch([rollouts[i] for i in part]) for part in parts]

    def _sample(self, requests: Sequence[Request], step: int) -> list[tuple[Row, Rollout]]:
        """One rollout of each request; each mode in a call of its own, because their lengths are far apart."""
        options, rollouts = self.options, []
        for mode in Mode:
            chosen = [r for r in requests if r.mode is mode]
            if not chosen:
                continue
            found = sample(
                self.student.model,
                [r.prompt_ids for r in chosen],
                max_new_tokens=options.max_new_tokens,
                temperature=options.sampling_temperature or options.temperature,
                max_length=self.config.data.max_length,
                seed=hash((self.config.training.seed, step, distributed.rank(), mode.thinking)) % 2**63,
                logprobs=self.weighs,
                **self.student.sampling,
            )
            names = (f"{r.example_id} ({mode.value})" for r in chosen)
            rollouts += [(rollout_row(r, name), r) for r, name in zip(found, names, strict=True)]
        return rollouts

    @property
    def weighs(self) -> bool:
        """Whether the loss weighs tokens by how likely the sampler found them: only where it sampled at another
        temperature.
        """
        other = self.options.sampling_temperature not in (None, self.options.temperature)
        return other and self.loss.objective.on_sampled_token

    def _batch(self, part: Sequence[tuple[Row, Rollout]]) -> MicroBatch:
        rows = [row for row, _ in part]
        tokens = pad(rows, self.student.tokenizer.pad_token_id).targets
        candidates = self._own_top_k(rows) if self.loss.on_student_support else None
        bounds = np.cumsum([len(row.ids) - row.start for row in rows])[:-1]
        asked = [None] * len(rows) if candidates is None else np.split(candidates.astype(np.int32), bounds)
        spec = self.loss.spec
        future = self.client.submit_score([r.tokens(c) for r, c in zip(rows, asked, strict=True)], spec)
        drawn = [r.logprobs for _, r in part if r.logprobs is not None]
        return MicroBatch(
            rows,
            lambda: self.loss.targets(tokens, future.result(), spec.temperatures, candidates),
            torch.from_numpy(np.concatenate(drawn)) if drawn else None,
        )

    def _own_top_k(self, rows: Sequence[Row]) -> np.ndarray:
        """int64[N,K]: the student's most likely ids at each completion token, chosen without looking at the token."""
        padded, model = pad(rows, self.student.tokenizer.pad_token_id), self.student.model
        device = next(model.parameters()).device

        def choose(hidden: torch.Tensor, head: Any) -> torch.Tensor:
            return student_top_k(
                hidden, Head(head.weight, getattr(head, "bias", None), self.loss.vocab_size), self.loss.top_k
            )

        with torch.no_grad():
            ids = model(
                input_ids=torch.from_numpy(padded.input_ids).to(device),
                places=torch.from_numpy(padded.places).to(device),
                objective=choose,
            )
        return np.ascontiguousarray(ids.cpu().numpy())
