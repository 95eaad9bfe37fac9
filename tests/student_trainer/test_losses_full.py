"""The exact divergences from hidden states and the teacher's head: values and gradients against plain autograd over
both models' whole logits, finite differences, agreement with a top K that is the vocabulary, and memory.

Legend: N positions, H and W hidden sizes of student and teacher, V logits of the student, R real vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from student_trainer.losses import (
    LOSSES,
    SOFT_LOSSES,
    FullTargets,
    Head,
    Objective,
    cross_entropy,
    distillation_loss,
    distillation_loss_from_logits,
    exact_logits,
    full_divergence,
)
from tests.student_trainer.test_losses_chunked import largest, random, said_by

N, H, W, V, R = 13, 6, 9, 24, 21

OBJECTIVES = [
    Objective("forward_kl"),
    Objective("reverse_kl", alpha=0.7, beta=0.3, t_squared=True),
    Objective("jsd", jsd_beta=0.3, alpha=0.7, beta=0.3),
    Objective("jsd", jsd_beta=0.0),
    Objective("jsd", jsd_beta=1.0, beta=0.5),
    Objective("jsd", jsd_beta=0.5, t_squared=True),
    Objective(alpha=0.0, beta=1.0),
]


def name(objective: Objective) -> str:
    return f"{objective.loss}-{objective.jsd_beta}-{objective.alpha}-{objective.beta}"


def full(temperature: float = 2.0, *, padded: bool = False, dtype: torch.dtype = torch.float64) -> FullTargets:
    """What a teacher of width W says at N positions; with `padded` its head has three rows that are no tokens."""
    weight = random(R + 3 * padded, W, seed=11, dtype=dtype)
    tokens = torch.randint(0, R, (N,), generator=torch.Generator().manual_seed(7))
    head = Head(weight, random(len(weight), seed=12, dtype=dtype), R)
    return FullTargets(random(N, W, seed=13, dtype=dtype), head, temperature, tokens)


def reference(z_NV: Tensor, targets: FullTargets, objective: Objective, weights_N: Tensor) -> Tensor:
    """The loss by autograd on whole logits."""
    teacher_NR = exact_logits(targets.hidden_NW, targets.head)
    t = targets.temperature
    soft_N = full_divergence(z_NV, teacher_NR, objective.loss, t, objective.jsd_beta, R)
    hard_N = cross_entropy(z_NV, targets.token_ids_N, R)
    return ((objective.soft_scale(t) * soft_N + objective.beta * hard_N) * weights_N).sum()


@pytest.mark.parametrize("objective", OBJECTIVES, ids=name)
@pytest.mark.parametrize(("temperature", "bias"), [(2.0, True), (1.0, False), (0.6, True)])
def test_values_and_gradients_are_those_of_autograd_on_both_models_logits(
    objective: Objective, temperature: float, bias: bool
) -> None:
    targets, weights = full(temperature, padded=bias), random(N, seed=5).abs() * (torch.arange(N) % 4 > 0)
    leaves = [random(N, H, seed=1), random(V, H, seed=2), *([random(V, seed=3)] if bias else [])]

    def run(chunk_size: int | None) -> list[Tensor]:
        mine = [x.clone().requires_grad_() for x in leaves]
        if chunk_size == 0:
            value = reference(mine[0] @ mine[1].T + (mine[2] if bias else 0), targets, objective, weights)
        else:
            head = Head(mine[1], mine[2] if bias else None, R)
            value = distillation_loss(mine[0], head, targets, objective, weights_N=weights, chunk_size=chunk_size).loss
        (3 * value).backward()
        return [value.detach(), *(x.grad for x in mine if x.grad is not None)]

    want = run(0)
    for chunk_size in (1, 4, N, None):
        found = run(chunk_size)
        assert len(found) == len(want) == 3 + bias
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
        assert (found[2][R:] == 0).all()


@pytest.mark.parametrize("objective", OBJECTIVES, ids=name)
def test_gradients_are_those_of_finite_differences(objective: Objective) -> None:
    targets = full()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return distillation_loss(hidden, Head(weight, None, R), targets, objective, chunk_size=5).loss

    inputs = [random(N, H, seed=1).requires_grad_(), random(V, H, seed=2).requires_grad_()]
    loss(*inputs).backward()
    for seed in range(3):
        for i, x in enumerate(inputs):
            step = 1e-6 * random(*x.shape, seed=20 + seed)
            ends = [
                [y.detach() + sign * step if j == i else y.detach() for j, y in enumerate(inputs)] for sign in (1, -1)
            ]
            slope = (loss(*ends[0]) - loss(*ends[1])) / 2
            assert x.grad is not None
            assert float(slope) == pytest.approx(float((x.grad * step).sum()), rel=1e-6, abs=1e-13)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=name)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_top_k_of_the_whole_vocabulary_gives_the_same_loss_gradient_and_metrics(
    objective: Objective, temperature: float
) -> None:
    whole = full(temperature)
    bucketed = said_by(exact_logits(whole.hidden_NW, whole.head).float(), R, temperature)
    bucketed = replace(bucketed, token_ids_N=whole.token_ids_N)
    found = []
    for targets in (whole, bucketed):
        hidden = random(N, H, seed=1, dtype=torch.float32).requires_grad_()
        head = Head(random(V, H, seed=2, dtype=torch.float32), None, R)
        output = distillation_loss(hidden, head, targets, objective)
        output.loss.backward()
        m = output.metrics
        assert hidden.grad is not None
        metrics = [m.soft_N, m.forward_kl_N, m.reverse_kl_N, m.student_entropy_N, m.teacher_tail_N, m.token_logprob_N]
        found.append([output.loss / N, hidden.grad, *metrics, *([m.hard_N] if m.hard_N is not None else [])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_from_logits_the_loss_and_its_gradient_are_the_same_as_through_a_head() -> None:
    targets, objective = full(), Objective("reverse_kl", beta=0.3)
    hidden, weight = random(N, H, seed=1), random(V, H, seed=2)
    logits = (hidden @ weight.T).requires_grad_()
    output = distillation_loss_from_logits(logits, targets, objective, vocab_size=R, chunk_size=4)
    output.loss.backward()
    leaf = hidden.clone().requires_grad_()
    through = distillation_loss(leaf, Head(weight, None, R), targets, objective)
    through.loss.backward()
    torch.testing.assert_close(output.loss, through.loss)
    torch.testing.assert_close(logits.grad @ weight, leaf.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_hidden_states_meet_a_half_precision_head_without_rounding_a_logit(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("student_trainer.losses.full.SLICE_BYTES", 4 * W * 5)
    targets = full(dtype=dtype)
    want = targets.hidden_NW.double() @ targets.head.weight_VH.double().T + targets.head.bias_V.double()
    found = exact_logits(targets.hidden_NW, targets.head)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), want, rtol=1e-6, atol=1e-5)


def test_a_student_that_is_the_teacher_has_no_divergence_and_no_gradient() -> None:
    targets = full(1.5)
    for loss in SOFT_LOSSES:
        hidden = targets.hidden_NW.clone().requires_grad_()
        output = distillation_loss(hidden, targets.head, targets, Objective(loss))
        output.loss.backward()
        assert float(output.metrics.soft_N.abs().max()) < 1e-9
        assert hidden.grad is not None
        assert float(hidden.grad.abs().max()) < 1e-9


def test_the_logits_of_neither_side_ever_exist_for_all_positions() -> None:
    n, v, h = 512, 4096, 8
    targets = FullTargets(
        random(n, W, seed=13, dtype=torch.float32), Head(random(v, W, seed=11, dtype=torch.float32)), 2.0
    )
    hidden = random(n, h, seed=1, dtype=torch.float32).requires_grad_()
    head = Head(random(v, h, seed=2, dtype=torch.float32).requires_grad_())
    with largest() as seen:
        distillation_loss(hidden, head, targets, Objective("jsd"), chunk_size=16).loss.backward()
    assert seen.numel <= max(16 * v, v * h, n * W)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"temperature": 0.0}, "temperature must be finite and above 0, got 0.0"),
        ({"hidden_NW": torch.zeros(N, W + 1)}, r"torch.float32\[13, 10\], which does not fit a head of \[21, 9\]"),
        ({"token_ids_N": torch.zeros(N - 1, dtype=torch.int64)}, r"must be int64\[13\], got torch.int64\[12\]"),
        ({"token_ids_N": torch.full((N,), R)}, "outside the vocabulary of 21"),
        ({"hidden_NW": torch.full((N, W), torch.nan)}, "13 of 13 rows are not finite, the first is row 0"),
        ({"head": Head(torch.zeros(R - 1, W))}, "head has 20 real rows, the student's 21"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_the_numbers(change: dict[str, object], words: str) -> None:
    head = Head(random(V, H, seed=2, dtype=torch.float32), None, R)
    hidden, good = random(N, H, seed=1, dtype=torch.float32), full(dtype=torch.float32)
    with pytest.raises(ValueError, match=words):
        distillation_loss(hidden, head, replace(good, **change), Objective())


@pytest.mark.parametrize("loss", sorted(set(LOSSES) - set(SOFT_LOSSES)))
def test_estimators_on_the_sampled_token_are_refused(loss: str) -> None:
    with pytest.raises(ValueError, match=f"the loss {loss} is an estimator"):
        distillation_loss(random(N, H, seed=1), Head(random(V, H, seed=2), None, R), full(), Objective(loss))


def test_the_cross_entropy_needs_tokens_and_no_position_at_all_is_fine() -> None:
    hidden, head = random(N, H, seed=1), Head(random(V, H, seed=2), None, R)
    without = replace(full(), token_ids_N=None)
    with pytest.raises(ValueError, match="no token_ids_N for the cross-entropy"):
        distillation_loss(hidden, head, without, Objective(beta=0.1))
    assert float(distillation_loss(hidden[:0], head, full().rows(0, 0), Objective("jsd", beta=0.1)).loss) == 0
    output = distillation_loss(hidden, head, without, Objective())
    assert output.metrics.token_logprob_N is None
