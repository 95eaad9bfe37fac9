"""Importance weights of old rollouts, by enumerating every sequence of a small vocabulary.

Legend: N positions, L tokens of a sequence, H hidden size, K ids of the support, V logits of one position.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from student_trainer.losses import (
    FullTargets,
    Head,
    ImportanceWeights,
    Objective,
    TeacherTargets,
    distillation_loss,
)
from tests.student_trainer.test_losses_chunked import random, said_by

L, H, V, K, TEMPERATURE = 3, 4, 3, 2, 1.7
SEQUENCES = list(itertools.product(range(V), repeat=L))
PREFIXES = [p for length in range(L) for p in itertools.product(range(V), repeat=length)]
HIDDEN = dict(zip(PREFIXES, random(len(PREFIXES), H, seed=1), strict=True))
TEACHER = dict(zip(PREFIXES, random(len(PREFIXES), V, seed=2), strict=True))
NOW, OLD = random(V, H, seed=3), random(V, H, seed=4)
NO_CAP = (0.0, float("inf"))

OBJECTIVES = [
    Objective("reverse_kl", importance_clip=NO_CAP),
    Objective("forward_kl", t_squared=True, importance_clip=NO_CAP),
    Objective("jsd", jsd_beta=0.3, importance_clip=NO_CAP),
]


def prefixes(y: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [y[:t] for t in range(L)]


def logprobs(weight: Tensor, y: tuple[int, ...]) -> Tensor:
    """float[L]: log-probabilities of the tokens of `y` at the temperature."""
    z = torch.stack([HIDDEN[p] for p in prefixes(y)]) @ weight.T / TEMPERATURE
    return z.log_softmax(-1).gather(1, torch.tensor(y)[:, None])[:, 0]


def targets(sequences: list[tuple[int, ...]], full: bool) -> TeacherTargets | FullTargets:
    rows = torch.stack([TEACHER[p] for y in sequences for p in prefixes(y)])
    tokens = torch.tensor(sequences).flatten()
    if full:
        return FullTargets(rows, Head(torch.eye(V, dtype=rows.dtype), None, V), TEMPERATURE, tokens)
    said = said_by(rows, K, TEMPERATURE)
    return TeacherTargets(
        said.ids_NK, said.logprobs_NK, said.log_normalizer_N, said.tail_logprob_N, TEMPERATURE, tokens, None
    )


def gradient(
    objective: Objective, sequences: list[tuple[int, ...]], weights: Tensor, full: bool, **options: object
) -> Tensor:
    """By the student's weights, of the losses of whole sequences, each times its weight."""
    weight = NOW.clone().requires_grad_()
    hidden = torch.stack([HIDDEN[p] for y in sequences for p in prefixes(y)])
    each = weights.repeat_interleave(L)
    said = targets(sequences, full)
    distillation_loss(hidden, Head(weight), said, objective, weights_N=each, **options).loss.backward()  # type: ignore[arg-type]
    assert weight.grad is not None
    return weight.grad


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.loss)
@pytest.mark.parametrize("full", [False, True], ids=["bucketed", "full"])
@pytest.mark.parametrize("chunk_size", [1, 2, 7, None])
def test_prefix_weights_make_the_expected_gradient_of_old_rollouts_that_of_fresh_ones(
    objective: Objective, full: bool, chunk_size: int | None
) -> None:
    now, old = (torch.stack([logprobs(w, y).sum().exp() for y in SEQUENCES]) for w in (NOW, OLD))
    rollout = torch.cat([logprobs(OLD, y) for y in SEQUENCES])
    begins = torch.arange(len(rollout)) % L == 0
    weighed = {"rollout_logprobs_N": rollout, "begins_N": begins, "chunk_size": chunk_size}
    fresh = gradient(objective, SEQUENCES, now, full)
    torch.testing.assert_close(gradient(objective, SEQUENCES, old, full, **weighed), fresh)
    stale = gradient(objective, SEQUENCES, old, full)
    assert float((stale - fresh).norm()) > 0.05 * float(fresh.norm()), "without weights it is another gradient"


def test_a_prefix_ends_at_its_sequence_and_before_its_token() -> None:
    now = torch.tensor([-1.0, -2.0, -0.5, -1.0, -3.0, -0.1], requires_grad=True)
    rollout = torch.tensor([-1.5, -1.0, -9.0, -1.5, -1.0, 0.0])
    begins = torch.tensor([True, False, False, True, False, True])
    want = torch.tensor([0.0, 0.5, -0.5, 0.0, 0.5, 0.0]).exp()
    for size in (1, 2, 4, 6):
        weights = ImportanceWeights(rollout, begins, NO_CAP)
        found = torch.cat([weights.of(slice(i, i + size), now[i : i + size]) for i in range(0, 6, size)])
        torch.testing.assert_close(found, want)
        assert not found.requires_grad
    assert ImportanceWeights(rollout, begins, (0.0, 1.2)).of(slice(0, 6), now).max() == torch.tensor(1.2)


def test_equal_policies_weigh_every_prefix_alike_however_long() -> None:
    now = -random(20_000, seed=5).abs().float()
    begins = torch.arange(len(now)) % 10_000 == 0
    assert torch.equal(ImportanceWeights(now, begins, (0.0, 2.0)).of(slice(0, len(now)), now), torch.ones_like(now))


def test_metrics_carry_the_weights() -> None:
    rollout = torch.cat([logprobs(OLD, y) for y in SEQUENCES[:2]])
    begins = torch.arange(2 * L) % L == 0
    hidden = torch.stack([HIDDEN[p] for y in SEQUENCES[:2] for p in prefixes(y)])
    options = {"rollout_logprobs_N": rollout, "begins_N": begins}
    for full in (False, True):
        said = targets(SEQUENCES[:2], full)
        plain = distillation_loss(hidden, Head(NOW), said, OBJECTIVES[0]).metrics
        metrics = distillation_loss(hidden, Head(NOW), said, OBJECTIVES[0], **options).metrics  # type: ignore[arg-type]
        assert plain.importance_weight_N is None
        assert metrics.importance_weight_N is not None
        assert metrics.importance_weight_N[[0, L]].tolist() == [1.0, 1.0]
        torch.testing.assert_close(metrics.soft_N, plain.soft_N * metrics.importance_weight_N)
        torch.testing.assert_close(metrics.reverse_kl_N, plain.reverse_kl_N)


def test_weights_that_a_loss_cannot_use_are_refused() -> None:
    rows, rollout, begins = random(L, H, seed=6), torch.zeros(L), torch.ones(L, dtype=torch.bool)

    def loss(name: str, **options: Tensor) -> None:
        said = said_by(random(L, V, seed=7), K, TEMPERATURE)
        distillation_loss(rows, Head(NOW), said, Objective(name), **options)  # type: ignore[arg-type]

    with pytest.raises(ValueError, match="reverse_kl are those of prefixes and need begins_N"):
        loss("reverse_kl", rollout_logprobs_N=rollout)
    with pytest.raises(ValueError, match="k2 are those of tokens and take no begins_N"):
        loss("k2", rollout_logprobs_N=rollout, begins_N=begins)
    with pytest.raises(ValueError, match=r"begins_N must have shape \[3\], got \[2\]"):
        loss("reverse_kl", rollout_logprobs_N=rollout, begins_N=begins[:2])
