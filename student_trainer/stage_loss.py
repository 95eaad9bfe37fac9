"""From the teacher's scores to a stage's loss: what to ask for, the targets as tensors, and the loss as a function of
hidden states.

Between `protos.scores` (numpy, from the wire) and `losses` (pure functions of tensors); knows no Trainer. Legend: N
completion tokens of a micro-batch, K alternatives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from protos.scores import Field, Scores, ScoreSpec

from .config import NonPolicyDistillation, PolicyDistillation
from .full_distribution import TeacherHead
from .losses import FullTargets, Head, Objective, Targets, TeacherTargets, distillation_loss

METRICS = ("loss", "soft_loss", "cross_entropy", "forward_kl", "reverse_kl", "tail_share")
"""Means over completion tokens. Divergences and the teacher's tail are at the loss's temperature, cross-entropy at 1
(0 where it has no weight); `loss` is alpha * soft_loss (times T^2 where asked for) + beta * cross_entropy.
"""

COLUMNS = (*METRICS, "importance_weight")
"""METRICS and the mean importance weight, where rollouts are weighed."""

LossOf = Callable[[torch.Tensor, Any], tuple[torch.Tensor, torch.Tensor]]
"""(hidden [N,H], LM head module) -> (summed loss, a scalar with gradient; sums of METRICS, or of COLUMNS where rollouts
are weighed, float32, detached).
"""


@dataclass(frozen=True)
class StageLoss:
    """A loss at one temperature over one support.

    `top_k` 0 means no support: the token that stands there alone. `vocab_size` is the number of logits that both
    sides normalise over. `on_student_support` means that the support is the student's own top K, which the teacher
    scores as candidates. With `teacher`, its LM head, the loss is over the whole vocabulary and needs no support.
    """

    objective: Objective
    temperature: float
    top_k: int
    vocab_size: int
    on_student_support: bool = False
    teacher: TeacherHead | None = None

    @staticmethod
    def off_policy(options: NonPolicyDistillation, vocab_size: int, teacher: TeacherHead | None = None) -> StageLoss:
        """Stage 1: alpha * soft(T) + beta * cross-entropy. `teacher` is needed where `options.distribution` is full."""
        objective = Objective(options.loss, options.jsd_beta, options.alpha, options.beta, options.t_squared)
        if options.distribution == "full":
            return _full(objective, options.temperature, teacher)
        top_k = min(options.top_k, vocab_size) if options.alpha > 0 else 0
        return StageLoss(objective, options.temperature, top_k, vocab_size)

    @staticmethod
    def on_policy(options: PolicyDistillation, vocab_size: int, teacher: TeacherHead | None = None) -> StageLoss:
        """Stage 2: a divergence on the student's own tokens, on the teacher's top K, the student's, or everything."""
        own = options.support == "student" and options.loss == "reverse_kl"
        name = "reverse_kl_sampled_tail" if own else options.loss
        objective = Objective(name, options.jsd_beta, t_squared=options.t_squared)
        if options.distribution == "full":
            return _full(objective, options.temperature, teacher)
        top_k = 0 if name == "policy_gradient" else min(options.top_k, vocab_size)
        return StageLoss(objective, options.temperature, top_k, vocab_size, own)

    @staticmethod
    def plain(vocab_size: int, top_k: int, teacher: TeacherHead | None = None) -> StageLoss:
        """Forward KL and cross-entropy at temperature 1: what models are measured with, whatever they were trained
        with. Exact where the teacher's head is there.
        """
        objective = Objective("forward_kl", beta=1.0)
        if teacher is not None:
            return _full(objective, 1.0, teacher)
        return StageLoss(objective, 1.0, min(top_k, vocab_size), vocab_size)

    def measured(self, plain: StageLoss) -> StageLoss:
        """The same loss on the support of `plain`, to be measured: for an estimator, the divergence it estimates."""
        name = self.objective.loss if self.objective.loss in ("forward_kl", "reverse_kl", "jsd") else "reverse_kl"
        old = self.objective
        objective = Objective(name, old.jsd_beta, old.alpha, old.beta, old.t_squared)
        return StageLoss(objective, self.temperature, plain.top_k, plain.vocab_size, teacher=plain.teacher)

    @property
    def spec(self) -> ScoreSpec:
        """What the teacher is asked for."""
        if self.teacher is not None:
            return ScoreSpec(want=frozenset({Field.HIDDEN_STATES}))
        if not self.on_student_support:
            return ScoreSpec(self.top_k, (self.temperature,))
        want = frozenset({Field.TOKEN_LOGPROBS, Field.CANDIDATE_LOGPROBS, Field.LOG_NORMALIZER})
        return ScoreSpec(0, (self.temperature,), want)

    def targets(
        self,
        tokens: np.ndarray,
        scores: Sequence[Scores],
        temperatures: Sequence[float],
        candidates: np.ndarray | None = None,
    ) -> Targets:
        """The targets of int64[N] completion tokens, from the scores of their sequences in the same order, on the CPU.

        `temperatures` are those that the scores were asked at, `candidates` int64[N,K] the ids that the teacher was
        asked about. ValueError where the numbers cannot be a distribution.
        """
        targets = self._targets(tokens, scores, temperatures, candidates)
        targets.check(self.vocab_size)
        return targets

    def _targets(
        self, tokens: np.ndarray, scores: Sequence[Scores], temperatures: Sequence[float], candidates: np.ndarray | None
    ) -> Targets:
        if self.teacher is not None:
            hidden = self.teacher.hidden(scores)
            return FullTargets(hidden, self.teacher.head, self.temperature, torch.from_numpy(tokens))
        m = list(temperatures).index(self.temperature)
        normalizer = _column([_of(s.log_normalizer)[:, m] for s in scores])
        token_logprobs = _column([_of(s.token_logprobs) for s in scores])
        token_ids = torch.from_numpy(tokens)
        if candidates is not None:
            logprobs = _column([_of(s.candidate_logprobs) for s in scores])
            return TeacherTargets.from_candidates(
                torch.from_numpy(candidates),
                logprobs,
                normalizer,
                vocab_size=self.vocab_size,
                temperature=self.temperature,
                token_ids_N=token_ids,
                token_logprobs_N=token_logprobs,
            )
        if self.top_k == 0:
            nothing = torch.zeros((len(tokens), 0))
            tail = torch.zeros(len(tokens))
            return TeacherTargets(
                nothing.long(), nothing, normalizer, tail, self.temperature, token_ids, token_logprobs
            )
        return TeacherTargets(
            _column([_of(s.top_token_ids) for s in scores]).long(),
            _column([_of(s.top_logprobs) for s in scores]),
            normalizer,
            _column([_of(s.tail_logprob)[:, m] for s in scores]),
            self.temperature,
            token_ids,
            token_logprobs,
        )

    def on(
        self,
        targets: Targets,
        rollout_logprobs: torch.Tensor | None = None,
        first_tokens: torch.Tensor | None = None,
    ) -> LossOf:
        """The loss as a function of hidden states and head; `rollout_logprobs` float32[N] turn on importance weights,
        for which divergences need `first_tokens` bool[N], the first of each completion.
        """
        begins = None if self.objective.on_sampled_token else first_tokens

        def loss_of(hidden: torch.Tensor, head: Any) -> tuple[torch.Tensor, torch.Tensor]:
            whole = Head(head.weight, getattr(head, "bias", None), self.vocab_size)
            # The targets were checked on the CPU; a loss that is no number is the Trainer's to name.
            loss, metrics = distillation_loss(
                hidden,
                whole,
                targets,
                self.objective,
                rollout_logprobs_N=rollout_logprobs,
                begins_N=begins,
                validate=False,
            )
            hard = metrics.hard_N if metrics.hard_N is not None else torch.zeros_like(metrics.soft_N)
            columns = [metrics.soft_N, hard, metrics.forward_kl_N, metrics.reverse_kl_N, metrics.teacher_tail_N]
            if metrics.importance_weight_N is not None:
                columns.append(metrics.importance_weight_N)
            return loss, torch.stack([loss.detach().float(), *(c.sum() for c in columns)])

        return loss_of


def _full(objective: Objective, temperature: float, teacher: TeacherHead | None) -> StageLoss:
    if teacher is None:
        raise ValueError("a loss over the whole distribution needs the teacher's LM head")
    return StageLoss(objective, temperature, 0, teacher.vocab_size, teacher=teacher)


def _of(array: np.ndarray | None) -> np.ndarray:
    assert array is not None, "the teacher left out a field that was asked for"
    return array


def _column(parts: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts))
