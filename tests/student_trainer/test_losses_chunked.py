"""The chunked losses equal the reference, hold no logits of all positions, and refuse what does not fit.

Legend: N positions, K ids of the support, H hidden size, V logits, of which R are real.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from student_trainer.losses import (
    LOSSES,
    SAMPLED_LOSSES,
    SOFT_LOSSES,
    TAIL_FLOOR,
    Head,
    Objective,
    TeacherTargets,
    distillation_loss,
    distillation_loss_from_logits,
    reference_loss,
    student_top_k,
)

N, K, H, V, R = 13, 5, 6, 24, 21


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def said_by(logits_NV: Tensor, k: int = K, temperature: float = 2.0, seed: int = 7) -> TeacherTargets:
    """A server's answer from whole logits of real ids, in the logits' dtype; the tokens that stand there are random."""
    n, v = logits_NV.shape
    tokens_N = torch.randint(0, v, (n,), generator=torch.Generator().manual_seed(seed))
    l_NV = logits_NV.log_softmax(-1)
    ids_NK = l_NV.topk(k, -1).indices
    at_t_NV = (logits_NV / temperature).log_softmax(-1)
    tail_N = at_t_NV.scatter(1, ids_NK, -torch.inf).logsumexp(-1).clamp(min=TAIL_FLOOR)
    normalizer_N = (l_NV / temperature).logsumexp(-1)
    token_N = l_NV.gather(1, tokens_N[:, None])[:, 0]
    return TeacherTargets(ids_NK, l_NV.gather(1, ids_NK), normalizer_N, tail_N, temperature, tokens_N, token_N)


def same_metrics(found: object, want: object) -> None:
    for f in fields(found):  # type: ignore[arg-type]
        a, b = getattr(found, f.name), getattr(want, f.name)
        assert (a is None) == (b is None), f.name
        if a is not None:
            assert not a.requires_grad
            assert a.dtype == torch.float32
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=f.name)


OBJECTIVES = [
    *(
        Objective(loss, jsd_beta=0.3, alpha=0.7, beta=beta, t_squared=beta > 0)
        for loss in LOSSES
        for beta in (0.0, 0.3)
    ),
    Objective("jsd", jsd_beta=0.0),
    Objective("jsd", jsd_beta=1.0),
    Objective(alpha=0.0, beta=1.0),
]


def name(objective: Objective) -> str:
    return f"{objective.loss}-{objective.jsd_beta}-{objective.alpha}-{objective.beta}"


@pytest.mark.parametrize("objective", OBJECTIVES, ids=name)
@pytest.mark.parametrize(
    ("temperature", "k", "bias"), [(2.0, K, True), (1.0, K, False), (0.6, R, True), (3.0, 0, False)]
)
def test_chunks_of_any_size_give_the_references_values_metrics_and_gradients(objective, temperature, k, bias):
    hidden, weight, shift = random(N, H, seed=1), random(V, H, seed=2), random(V, seed=3)
    shift = shift if bias else None
    targets = said_by(random(N, R, seed=4), k, temperature)
    weights = random(N, seed=5).abs() * (torch.arange(N) % 4 > 0)
    rollout = random(N, seed=6) - 3 if bias else None
    begins = torch.arange(N) % 5 == 0 if bias and not objective.on_sampled_token else None

    options = {"weights_N": weights, "rollout_logprobs_N": rollout, "begins_N": begins}

    def run(loss: Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, object]]) -> tuple[list[Tensor], object]:
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, shift) if x is not None]
        value, metrics = loss(leaves[0], leaves[1], leaves[2] if bias else None)
        (3 * value).backward()
        return [value.detach(), *(x.grad for x in leaves if x.grad is not None)], metrics

    def whole(h: Tensor, w: Tensor, b: Tensor | None) -> tuple[Tensor, object]:
        z = h @ w.T if b is None else h @ w.T + b
        return reference_loss(z, targets, objective, vocab_size=R, **options)

    want, want_metrics = run(whole)
    for chunk_size in (1, 4, N, None):
        found, metrics = run(
            lambda h, w, b, c=chunk_size: distillation_loss(
                h, Head(w, b, R), targets, objective, chunk_size=c, **options
            )
        )
        assert len(found) == len(want) == 3 + bias
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
        same_metrics(metrics, want_metrics)
        assert torch.equal(found[2][R:], torch.zeros(V - R, H, dtype=torch.float64))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=name)
def test_from_logits_the_loss_and_its_gradient_are_the_references(objective):
    targets = said_by(random(N, R, seed=4))
    a, b = (random(N, V, seed=1).requires_grad_() for _ in range(2))
    found = distillation_loss_from_logits(a, targets, objective, vocab_size=R, chunk_size=3)
    want, metrics = reference_loss(b, targets, objective, vocab_size=R)
    found.loss.backward()
    want.backward()
    torch.testing.assert_close(found.loss, want)
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-11)
    same_metrics(found.metrics, metrics)
    assert a.grad is not None
    assert (a.grad[:, R:] == 0).all()


def test_padded_rows_have_no_influence_and_no_gradient_whatever_stands_in_them():
    targets, objective = said_by(random(N, R, seed=4)), Objective("jsd", beta=0.3)
    losses = []
    for size in (-1e3, 0.0, 1e3):
        hidden, weight = random(N, H, seed=1).requires_grad_(), random(V, H, seed=2)
        weight[R:] = size
        weight.requires_grad_()
        loss = distillation_loss(hidden, Head(weight, None, R), targets, objective).loss
        loss.backward()
        assert weight.grad is not None
        assert (weight.grad[R:] == 0).all()
        assert (weight.grad[:R] != 0).any()
        losses.append(float(loss.detach()))
    assert losses[0] == losses[1] == losses[2]
    padded = Head(torch.full((V, H), 1e3, dtype=torch.float64), None, None)
    assert float(distillation_loss(hidden.detach(), padded, targets, objective).loss) != losses[0]


def test_a_tied_head_gets_the_gradient_of_both_its_uses():
    targets, objective = said_by(random(N, V, seed=4)), Objective("forward_kl", beta=0.3)
    ids = torch.arange(N) % V
    grads = []
    for chunked in (True, False):
        table = random(V, H, seed=2).requires_grad_()
        hidden = torch.tanh(table[ids])
        if chunked:
            loss = distillation_loss(hidden, Head(table), targets, objective, chunk_size=5).loss
        else:
            loss = reference_loss(hidden @ table.T, targets, objective)[0]
        loss.backward()
        grads.append(table.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("frozen", ["hidden", "head", "both"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(frozen):
    targets, objective = said_by(random(N, R, seed=4)), Objective("reverse_kl")
    hidden, weight = random(N, H, seed=1), random(V, H, seed=2)
    hidden.requires_grad_(frozen == "head")
    weight.requires_grad_(frozen == "hidden")
    loss = distillation_loss(hidden, Head(weight, None, R), targets, objective).loss
    assert loss.requires_grad == (frozen != "both")
    if frozen != "both":
        loss.backward()
    assert (hidden.grad is None) == (frozen != "head")
    assert (weight.grad is None) == (frozen != "hidden")


def test_no_gradient_is_computed_where_none_is_asked_for_and_a_second_backward_is_refused():
    hidden, head = random(N, H, seed=1).requires_grad_(), Head(random(V, H, seed=2), None, R)
    targets = said_by(random(N, R, seed=4))
    with torch.no_grad():
        assert not distillation_loss(hidden, head, targets, Objective()).loss.requires_grad
    loss = distillation_loss(hidden, head, targets, Objective()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="ran already"):
        loss.backward()


def test_weights_mask_positions_and_no_position_at_all_gives_zero_gradients():
    hidden, weight = random(N, H, seed=1), random(V, H, seed=2)
    targets, objective = said_by(random(N, V, seed=4)), Objective("jsd", beta=0.3)
    mask = (torch.arange(N) < 4).double()
    a, b, none = (hidden[:n].clone().requires_grad_() for n in (N, 4, 0))
    distillation_loss(a, Head(weight), targets, objective, weights_N=mask / 9).loss.backward()
    (distillation_loss(b, Head(weight), targets.rows(0, 4), objective).loss / 9).backward()
    assert a.grad is not None
    torch.testing.assert_close(a.grad[:4], b.grad)
    assert (a.grad[4:] == 0).all()
    for h, t, w in ((none, targets.rows(0, 0), None), (a, targets, torch.zeros(N))):
        leaf = weight.clone().requires_grad_()
        output = distillation_loss(h, Head(leaf), t, objective, weights_N=w)
        output.loss.backward()
        assert float(output.loss.detach()) == 0
        assert leaf.grad is not None
        assert (leaf.grad == 0).all()
        assert len(output.metrics.soft_N) == len(h)


# Parity and alignment -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", sorted(SOFT_LOSSES))
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_student_that_is_the_teacher_has_a_loss_within_float32s_noise_and_a_shift_by_one_shows(loss, temperature):
    hidden, weight = random(64, 32, seed=1, dtype=torch.float32), random(2000, 32, seed=2, dtype=torch.float32)
    logits = hidden @ weight.T + 40  # the size of a real model's logits
    targets = said_by(logits, 64, temperature)
    bias = torch.full((2000,), 40.0)
    metrics = distillation_loss(hidden, Head(weight, bias), targets, Objective(loss)).metrics
    assert metrics.soft_N.abs().max() < 1e-5
    names = ("ids_NK", "logprobs_NK", "log_normalizer_N", "tail_logprob_N", "token_ids_N", "token_logprobs_N")
    shifted = replace(targets, **{n: getattr(targets, n).roll(1, 0) for n in names})
    planted = distillation_loss(hidden, Head(weight, bias), shifted, Objective(loss)).metrics
    assert planted.soft_N.median() > 0.1


def test_sampled_estimators_of_a_student_that_is_the_teacher_push_nowhere():
    hidden, weight = random(N, H, seed=1).requires_grad_(), random(V, H, seed=2)
    targets = said_by((hidden @ weight.T).detach(), K, 2.0)
    for loss in (*SAMPLED_LOSSES, "reverse_kl_sampled_tail"):
        hidden.grad = None
        distillation_loss(hidden, Head(weight), targets, Objective(loss)).loss.backward()
        assert hidden.grad is not None
        assert hidden.grad.abs().max() < 1e-12, loss


# Numbers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
def test_a_tiny_tail_of_the_student_keeps_its_gradient_where_one_minus_the_sum_would_be_zero(loss):
    z64 = torch.zeros(2, V, dtype=torch.float64)
    z64[:, 0] = 60.0  # the tail is 1e-25; in float32, 1 - sum is 0
    targets = said_by(random(2, V, seed=4), K, 1.0)
    targets = replace(targets, ids_NK=torch.arange(K).repeat(2, 1))
    grads = []
    for dtype in (torch.float32, torch.float64):
        z = z64.to(dtype).requires_grad_()
        distillation_loss_from_logits(z, targets, Objective(loss)).loss.backward()
        assert z.grad is not None
        grads.append(z.grad.double())
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)
    if loss == "forward_kl":
        assert (grads[0][:, K:] < -1e-3).all()  # the lost tail is pulled back


@pytest.mark.parametrize("temperature", [1.0, 0.6, 3.0])
def test_a_constant_added_to_the_logits_changes_nothing_however_large(temperature):
    targets = said_by(random(N, R, seed=4).float(), K, temperature)
    z = (random(N, R, seed=1) * 2).round().float()  # whole numbers, which float32 keeps exactly beside 1000
    outputs = [
        distillation_loss_from_logits(z + c, targets, Objective("jsd", beta=0.3)) for c in (0.0, 1000.0, -1000.0)
    ]
    for other in outputs[1:]:
        assert torch.equal(other.loss, outputs[0].loss)
        assert torch.equal(other.metrics.student_entropy_N, outputs[0].metrics.student_entropy_N)


def test_bf16_hidden_and_head_come_close_to_float32_and_keep_their_dtype():
    hidden, weight = random(40, 32, seed=1) / 3, random(300, 32, seed=2) / 3
    targets = said_by(random(40, 300, seed=4).float(), 16, 2.0)
    for objective in (Objective("forward_kl", beta=0.3), Objective("reverse_kl"), Objective("policy_gradient")):
        grads = []
        for dtype in (torch.bfloat16, torch.float32):
            h, w = (x.bfloat16().to(dtype).requires_grad_() for x in (hidden, weight))
            weights = torch.full((40,), 1e-6)
            output = distillation_loss(h, Head(w), targets, objective, chunk_size=7, weights_N=weights)
            assert output.loss.dtype == torch.float32
            output.loss.backward()
            assert h.grad is not None
            assert w.grad is not None
            assert h.grad.dtype == w.grad.dtype == dtype
            grads.append((h.grad.float(), w.grad.float()))
        for a, b in zip(*grads, strict=True):
            assert (a - b).norm() < 0.02 * b.norm()


def test_float16_gradients_survive_weights_that_it_cannot_hold():
    hidden, weight = random(40, 32, seed=1) / 3, random(300, 32, seed=2) / 3
    targets = said_by(random(40, 300, seed=4).float(), 16, 2.0)
    scale, grads = 65536.0, []  # what a gradient scaler multiplies the loss by
    for dtype in (torch.float16, torch.float32):
        h, w = (x.half().to(dtype).requires_grad_() for x in (hidden, weight))
        loss = distillation_loss(h, Head(w), targets, Objective(), weights_N=torch.full((40,), 1e-7)).loss
        (loss * scale).backward()
        grads.append((h.grad, w.grad))
    for a, b in zip(*grads, strict=True):
        assert a is not None
        assert b is not None
        assert a.dtype == torch.float16
        assert (a.float() - b).norm() < 0.02 * b.norm()


def test_under_autocast_the_head_runs_in_bf16_and_master_weights_get_float32_gradients():
    hidden, weight = random(40, 32, seed=1).float() / 3, random(300, 32, seed=2).float() / 3
    targets, objective = said_by(random(40, 300, seed=4).float(), 16, 2.0), Objective()
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = distillation_loss(h, Head(w), targets, objective)
        want = reference_loss(torch.nn.functional.linear(hidden, weight), targets, objective)
    found.loss.backward()
    torch.testing.assert_close(found.metrics.soft_N, want[1].soft_N, rtol=1e-4, atol=1e-5)
    assert w.grad is not None
    assert w.grad.dtype == torch.float32
    exact = distillation_loss(hidden, Head(weight), targets, objective).metrics.soft_N
    assert (exact - found.metrics.soft_N).abs().max() > 1e-5


# Memory ---------------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@contextmanager
def largest() -> Iterator[Largest]:
    with Largest() as mode:
        yield mode


@pytest.mark.parametrize("loss", LOSSES)
def test_no_operation_makes_a_tensor_of_all_positions_and_the_vocabulary(loss):
    n, v, h, chunk = 128, 512, 8, 16
    hidden, weight = random(n, h, seed=1).float().requires_grad_(), random(v, h, seed=2).float().requires_grad_()
    targets, objective = said_by(random(n, v, seed=4).float(), 8), Objective(loss, beta=0.3)
    with largest() as chunked:
        distillation_loss(hidden, Head(weight, None, v - 3), targets_below(targets, v - 3), objective, chunk_size=chunk)
        student_top_k(hidden, Head(weight), 8, chunk_size=chunk)
    assert chunked.numel == chunk * v
    with largest() as whole:
        reference_loss(hidden @ weight.T, targets, objective)
    assert whole.numel >= n * v


def targets_below(targets: TeacherTargets, size: int) -> TeacherTargets:
    """The same with random distinct ids below `size`: only shapes matter to who uses it."""
    ids = torch.stack([torch.randperm(size)[: targets.ids_NK.shape[1]] for _ in range(len(targets))])
    assert targets.token_ids_N is not None
    return replace(targets, ids_NK=ids, token_ids_N=targets.token_ids_N.clamp(max=size - 1))


# The student's own support, refusals --------------------------------------------------------------------------------


def test_the_students_top_k_are_its_most_likely_real_ids():
    hidden, weight, bias = random(N, H, seed=1).requires_grad_(), random(V, H, seed=2), random(V, seed=3)
    weight[R:] = 1e3 * hidden.detach()[0]
    found = student_top_k(hidden, Head(weight, bias, R), K, chunk_size=4)
    want = (hidden @ weight.T + bias)[:, :R].topk(K, -1).indices
    assert torch.equal(found, want)
    assert not found.requires_grad
    for k in (0, R + 1):
        with pytest.raises(ValueError, match=f"from 1 to {R}.*got {k}"):
            student_top_k(hidden, Head(weight, bias, R), k)


def test_what_does_not_fit_is_refused_with_its_numbers():
    hidden, weight = random(N, H, seed=1), random(V, H, seed=2)
    targets, head = said_by(random(N, R, seed=4)), Head(weight, None, R)
    bad_hidden, bad_weights = hidden.clone(), torch.ones(N)
    bad_hidden[3, 2], bad_weights[5] = math.nan, math.inf

    def loss(h: Tensor = hidden, t: TeacherTargets = targets, o: Objective | None = None, **options: object) -> None:
        distillation_loss(h, options.pop("head", head), t, o or Objective(), **options)  # type: ignore[arg-type]

    refusals: list[tuple[str, Callable[[], object]]] = [
        ("13 positions, the targets have 12", lambda: loss(t=targets.rows(0, 12))),
        (r"\[13, 5\], which does not fit a head of \[24, 6\]", lambda: loss(hidden[:, :5])),
        ("float32, the head torch.float64", lambda: loss(hidden.float())),
        (r"weights_N must have shape \[13\], got \[12\]", lambda: loss(weights_N=torch.ones(12))),
        (r"rollout_logprobs_N must have shape \[13\]", lambda: loss(rollout_logprobs_N=torch.ones(N, 1))),
        ("student's input: 1 of 13 rows are not finite, the first is row 3", lambda: loss(bad_hidden)),
        ("weights_N: 1 of 13 rows are not finite, the first is row 5", lambda: loss(weights_N=bad_weights)),
        ("vocabulary of 4;", lambda: loss(head=Head(weight, None, 4))),
        ("got 0", lambda: loss(chunk_size=0)),
        ("from 1 to the 24 rows of the head, got 25", lambda: Head(weight, None, 25)),
        (r"bias_V must have shape \[24\], got \[6\]", lambda: Head(weight, torch.zeros(6))),
        (r"shape \[24\]", lambda: Head(weight[:, 0])),
        ("no token_ids_N", lambda: loss(t=replace(targets, token_ids_N=None), o=Objective(beta=0.3))),
        ("token_logprobs_N is needed", lambda: loss(t=replace(targets, token_logprobs_N=None), o=Objective("k2"))),
        ("needs token_ids_N", lambda: loss(t=replace(targets, token_ids_N=None), o=Objective("k2"))),
    ]
    for pattern, call in refusals:
        with pytest.raises(ValueError, match=pattern):
            call()
