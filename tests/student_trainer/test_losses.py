"""Claims about the formulas, on a vocabulary small enough to know every answer: values, gradients, expectations.

Legend: N positions, K ids of the support, V vocabulary. Everything here is float64.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from student_trainer.losses import (
    CANDIDATE_TAIL_RESOLUTION,
    TAIL_FLOOR,
    Buckets,
    Objective,
    TeacherTargets,
    forward_kl,
    full_divergence,
    generalized_jsd,
    importance_weights,
    k2,
    k3,
    policy_gradient,
    reference_loss,
    reverse_kl,
    reverse_kl_sampled_tail,
    soft_loss,
    student_buckets,
)

N, V, K = 5, 11, 4
DIVERGENCES = [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.5), ("jsd", 0.1), ("jsd", 0.9)]


def logits(n: int, v: int, seed: int) -> Tensor:
    return 2.0 * torch.randn(n, v, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def teacher_targets(
    logits_NV: Tensor,
    k: int,
    temperature: float = 1.0,
    ids_NK: Tensor | None = None,
    token_ids_N: Tensor | None = None,
) -> TeacherTargets:
    """What a server says about whole logits: top k (or `ids_NK`), C_T, and the tail at T from the complement."""
    l_NV = logits_NV.log_softmax(-1)
    ids_NK = l_NV.topk(k, -1).indices if ids_NK is None else ids_NK
    at_t_NV = (logits_NV / temperature).log_softmax(-1)
    tail_N = at_t_NV.scatter(1, ids_NK, -torch.inf).logsumexp(-1).clamp(min=TAIL_FLOOR)
    tokens_N = None if token_ids_N is None else l_NV.gather(1, token_ids_N[:, None])[:, 0]
    normalizer_N = (l_NV / temperature).logsumexp(-1)
    return TeacherTargets(ids_NK, l_NV.gather(1, ids_NK), normalizer_N, tail_N, temperature, token_ids_N, tokens_N)


def differences(function, x: Tensor, step: float = 1e-6) -> Tensor:
    """Gradient of a scalar function by central differences."""
    grad = torch.zeros_like(x)
    for i in range(x.numel()):
        e = torch.zeros_like(x).flatten()
        e[i] = step
        e = e.view_as(x)
        grad.view(-1)[i] = (function(x + e) - function(x - e)) / (2 * step)
    return grad


def gradient(function, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(function(x).sum(), x)[0]


def both(seed: int = 0, n: int = N) -> tuple[Tensor, Tensor]:
    return logits(n, V, seed), logits(n, V, seed + 100)


# Bucketed divergences ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("loss", "b"), DIVERGENCES)
@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
def test_gradients_of_bucketed_losses_are_those_of_finite_differences(loss, b, temperature):
    student, teacher = both()
    targets = teacher_targets(teacher, K, temperature)

    def value(z: Tensor) -> Tensor:
        return soft_loss(z, targets, loss, b).sum()

    torch.testing.assert_close(gradient(value, student), differences(value, student), rtol=0, atol=1e-8)


def test_the_forward_kl_has_the_gradient_that_the_docs_state():
    student, teacher = both()
    targets = teacher_targets(teacher, K)
    p_s, p_t = student.softmax(-1), teacher.softmax(-1)
    on = torch.zeros(N, V, dtype=torch.bool).scatter(1, targets.ids_NK, True)
    r_s, r_t = ((p.masked_fill(on, 0)).sum(-1, keepdim=True) for p in (p_s, p_t))
    want = torch.where(on, p_s - p_t, p_s * (1 - r_t / r_s))
    torch.testing.assert_close(gradient(lambda z: soft_loss(z, targets, "forward_kl"), student), want)


def test_the_reverse_kl_has_the_gradient_that_the_docs_state():
    student, teacher = both()
    targets = teacher_targets(teacher, K)
    s = student_buckets(student, targets.ids_NK)
    t = targets.buckets()
    value = reverse_kl(s, t)
    d = (s.tail_logprob_N - t.tail_logprob_N)[:, None].expand(N, V).clone()
    d.scatter_(1, targets.ids_NK, s.logprobs_NK - t.logprobs_NK)
    want = student.softmax(-1) * (d - value[:, None])
    torch.testing.assert_close(gradient(lambda z: soft_loss(z, targets, "reverse_kl"), student), want)


@pytest.mark.parametrize(("loss", "b"), DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_bucketed_losses_are_lower_bounds_that_grow_with_k_and_are_exact_at_k_equal_v(loss, b, temperature):
    student, teacher = both(n=50)
    full = full_divergence(student, teacher, loss, temperature, b)
    previous = torch.zeros(50, dtype=torch.float64)
    for k in range(V + 1):
        value = soft_loss(student, teacher_targets(teacher, k, temperature), loss, b)
        assert (value >= previous - 1e-12).all(), k
        assert (value <= full + 1e-12).all(), k
        previous = value
    torch.testing.assert_close(previous, full)


@pytest.mark.parametrize(("loss", "b"), DIVERGENCES)
def test_at_k_equal_v_the_gradient_is_that_of_the_full_divergence(loss, b):
    student, teacher = both()
    targets = teacher_targets(teacher, V, 2.0)
    assert (targets.tail_logprob_N == TAIL_FLOOR).all()
    want = gradient(lambda z: full_divergence(z, teacher, loss, 2.0, b), student)
    torch.testing.assert_close(gradient(lambda z: soft_loss(z, targets, loss, b), student), want)


def test_b_of_the_jsd_at_its_ends_is_forward_and_reverse_kl_and_near_them_approaches_both():
    student, teacher = both()
    targets = teacher_targets(teacher, K)
    s, t = student_buckets(student, targets.ids_NK), targets.buckets()
    assert torch.equal(generalized_jsd(s, t, 0.0), forward_kl(s, t))
    assert torch.equal(generalized_jsd(s, t, 1.0), reverse_kl(s, t))
    torch.testing.assert_close(generalized_jsd(s, t, 1e-6) / 1e-6, forward_kl(s, t), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(generalized_jsd(s, t, 1 - 1e-6) / 1e-6, reverse_kl(s, t), rtol=1e-4, atol=1e-6)
    assert (forward_kl(s, t) - reverse_kl(s, t)).abs().min() > 1e-3
    with pytest.raises(ValueError, match=r"got 1\.5"):
        generalized_jsd(s, t, 1.5)


@pytest.mark.parametrize(("loss", "b"), DIVERGENCES)
@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_l_and_the_normaliser_give_the_loss_of_the_teachers_full_logits_at_the_temperature(loss, b, temperature):
    student, teacher = both()
    targets = teacher_targets(teacher, K, temperature)
    at_t = teacher_targets(teacher / temperature, K)  # the same distribution, now asked at temperature 1
    torch.testing.assert_close(
        soft_loss(student, targets, loss, b), soft_loss(student / temperature, at_t, loss, b), rtol=1e-12, atol=1e-12
    )


def test_without_the_normaliser_a_student_that_is_the_teacher_would_have_a_loss():
    teacher = logits(N, V, 3)
    right = teacher_targets(teacher, K, 2.0)
    wrong = TeacherTargets(
        right.ids_NK, right.logprobs_NK, torch.zeros_like(right.log_normalizer_N), right.tail_logprob_N, 2.0
    )
    assert soft_loss(teacher, right).abs().max() < 1e-12
    assert soft_loss(teacher, wrong).abs().min() > 0.05
    with pytest.raises(ValueError, match="mass"):
        wrong.check(V)


def test_renormalised_on_the_support_is_blind_to_leaking_mass_and_the_bucketed_loss_is_not():
    teacher = logits(N, V, 3)
    targets = teacher_targets(teacher, K)
    leaking = teacher.clone().scatter(1, targets.ids_NK, teacher.gather(1, targets.ids_NK) - 5.0)
    s, t = student_buckets(leaking, targets.ids_NK), targets.buckets()
    q_s, q_t = s.logprobs_NK.log_softmax(-1), t.logprobs_NK.log_softmax(-1)
    assert (q_t.exp() * (q_t - q_s)).sum(-1).abs().max() < 1e-12
    assert forward_kl(s, t).min() > 0.5
    assert reverse_kl(s, t).min() > 0.5


def test_top_k_without_the_tail_has_the_wrong_optimum_and_the_bucketed_reverse_kl_has_the_right_one():
    teacher = logits(1, V, 3)
    targets = teacher_targets(teacher, K)
    mass_t = targets.logprobs_NK.exp().sum().item()

    def optimum(tail: bool) -> float:
        z = torch.zeros(1, V, dtype=torch.float64, requires_grad=True)
        for _ in range(1500):
            s, t = student_buckets(z, targets.ids_NK), targets.buckets()
            value = reverse_kl(s, t) if tail else (s.logprobs_NK.exp() * (s.logprobs_NK - t.logprobs_NK)).sum()
            (grad,) = torch.autograd.grad(value.sum(), z)
            z = (z - 3 * grad).detach().requires_grad_()
        return float(student_buckets(z.detach(), targets.ids_NK).logprobs_NK.exp().sum())

    assert optimum(tail=True) == pytest.approx(mass_t, abs=1e-3)
    assert optimum(tail=False) == pytest.approx(mass_t / math.e, abs=1e-3)


def test_a_teachers_tail_at_the_floor_has_no_mass_and_costs_are_finite():
    teacher = logits(N, V, 3)
    teacher[:, K:] = -1e4
    targets = teacher_targets(teacher, K)
    assert (targets.tail_logprob_N == TAIL_FLOOR).all()
    student = logits(N, V, 4)
    s, t = student_buckets(student, targets.ids_NK), targets.buckets()
    support = (t.logprobs_NK.exp() * (t.logprobs_NK - s.logprobs_NK)).sum(-1)
    for tail_N in (s.tail_logprob_N, torch.full((N,), -math.inf, dtype=torch.float64)):
        torch.testing.assert_close(forward_kl(Buckets(s.logprobs_NK, tail_N), t), support, rtol=0, atol=0)
    r = s.tail_logprob_N.exp()
    torch.testing.assert_close(
        reverse_kl(s, t), (s.logprobs_NK.exp() * (s.logprobs_NK - t.logprobs_NK)).sum(-1) + r * (r.log() + 100)
    )
    for loss, b in DIVERGENCES:
        assert gradient(lambda z, loss=loss, b=b: soft_loss(z, targets, loss, b), student).isfinite().all()


# Estimators on sampled tokens, expectations by enumerating every y ---------------------------------------------------


def expected_gradient(estimate, student: Tensor, temperature: float = 1.0) -> Tensor:
    """sum_y p_s(y) grad estimate(y), with p_s not differentiated: what sampling would give on average."""
    p = (student / temperature).softmax(-1)
    total = torch.zeros_like(student)
    for y in range(V):
        y_N = torch.full((len(student),), y)
        total += p[:, y : y + 1] * gradient(lambda z, y_N=y_N: estimate(z, y_N), student)
    return total


def at(z: Tensor, y_N: Tensor, temperature: float = 1.0) -> Tensor:
    return (z / temperature).log_softmax(-1).gather(1, y_N[:, None])[:, 0]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(
    ("estimator", "loss"), [(policy_gradient, "reverse_kl"), (k2, "reverse_kl"), (k3, "forward_kl")]
)
def test_expected_gradients_of_sampled_estimators_are_those_of_the_full_divergences(estimator, loss, temperature):
    student, teacher = both()
    found = expected_gradient(
        lambda z, y: estimator(at(z, y, temperature), at(teacher, y, temperature)), student, temperature
    )
    want = gradient(lambda z: full_divergence(z, teacher, loss, temperature), student)
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12)
    other = "forward_kl" if loss == "reverse_kl" else "reverse_kl"
    assert (found - gradient(lambda z: full_divergence(z, teacher, other, temperature), student)).abs().max() > 1e-2


def test_back_propagating_k1_teaches_nothing_on_average_which_is_why_it_is_not_offered():
    student, teacher = both()
    found = expected_gradient(lambda z, y: at(z, y) - at(teacher, y), student)
    assert found.abs().max() < 1e-12
    with pytest.raises(ValueError, match="k1"):
        Objective("k1")


def test_the_values_of_policy_gradient_and_k3_are_unbiased_for_the_reverse_kl():
    student, teacher = both()
    p, want = student.softmax(-1), full_divergence(student, teacher, "reverse_kl")
    for estimator in (policy_gradient, k3):
        values = [
            estimator(at(student, torch.full((N,), y)), at(teacher, torch.full((N,), y))) * p[:, y] for y in range(V)
        ]
        torch.testing.assert_close(torch.stack(values).sum(0), want)


@pytest.mark.parametrize("k", [0, 1, K, V])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_reverse_kl_on_the_students_support_is_unbiased_in_value_and_gradient(k, temperature):
    student, teacher = both()
    ids = student.topk(k, -1).indices
    objective = Objective("reverse_kl_sampled_tail")

    def estimate(z: Tensor, y_N: Tensor) -> Tensor:
        return reference_loss(z, teacher_targets(teacher, k, temperature, ids, y_N), objective)[0]

    want = gradient(lambda z: full_divergence(z, teacher, "reverse_kl", temperature), student)
    torch.testing.assert_close(expected_gradient(estimate, student, temperature), want, rtol=1e-9, atol=1e-12)
    p = (student / temperature).softmax(-1)
    values = [
        reference_loss(student, teacher_targets(teacher, k, temperature, ids, torch.full((N,), y)), objective)[1].soft_N
        * p[:, y]
        for y in range(V)
    ]
    torch.testing.assert_close(
        torch.stack(values).sum(0), full_divergence(student, teacher, "reverse_kl", temperature), rtol=1e-5, atol=1e-6
    )


def test_the_students_support_leaves_less_variance_than_the_sampled_token_alone():
    student, teacher = both()
    p = student.softmax(-1)

    def variance(k: int) -> float:
        ids = student.topk(k, -1).indices
        objective = Objective("reverse_kl_sampled_tail")
        grads = torch.stack(
            [
                gradient(
                    lambda z, y=y: reference_loss(
                        z, teacher_targets(teacher, k, 1.0, ids, torch.full((N,), y)), objective
                    )[0],
                    student,
                )
                for y in range(V)
            ]
        )
        weights = p.T[:, :, None]
        mean = (grads * weights).sum(0)
        return float(((grads - mean).square() * weights).sum())

    assert variance(K) < 0.5 * variance(0)
    assert variance(V) < 1e-20


def test_importance_weights_make_old_samples_unbiased_and_are_clipped_and_detached():
    student, teacher = both()
    old = student + 0.3 * logits(N, V, 9)
    total = torch.zeros_like(student)
    for y in range(V):
        y_N = torch.full((N,), y)

        def estimate(z: Tensor, y_N: Tensor = y_N) -> Tensor:
            now = at(z, y_N)
            return policy_gradient(now, at(teacher, y_N), importance_weights(now, at(old, y_N), (0.0, 1e9)))

        total += old.softmax(-1)[:, y : y + 1] * gradient(estimate, student)
    torch.testing.assert_close(total, gradient(lambda z: full_divergence(z, teacher, "reverse_kl"), student))
    now = torch.tensor([0.0, -1.0, -9.0], requires_grad=True)
    weights = importance_weights(now, torch.tensor([-5.0, -1.0, 0.0]), (0.5, 2.0))
    assert weights.tolist() == [2.0, 1.0, 0.5]
    assert not weights.requires_grad


def test_the_sampled_term_vanishes_where_the_token_is_in_the_support():
    s = Buckets(torch.tensor([[-1.0]]), torch.tensor([-0.4587]))
    t = Buckets(torch.tensor([[-2.0]]), torch.tensor([-0.1454]))
    inside, outside = (
        reverse_kl_sampled_tail(s, t, torch.tensor([-3.0]), torch.tensor([-7.0]), torch.tensor([flag]))
        for flag in (True, False)
    )
    assert float(inside) == pytest.approx(math.exp(-1.0))
    assert float(outside) == pytest.approx(math.exp(-1.0) + 4.0)


# The container ------------------------------------------------------------------------------------------------------


def test_targets_refuse_what_would_train_on_the_wrong_thing():
    good = teacher_targets(logits(N, V, 1), K, 2.0, token_ids_N=torch.arange(N))
    good.check(V)
    fields = ("ids_NK", "logprobs_NK", "log_normalizer_N", "tail_logprob_N", "token_ids_N", "token_logprobs_N")
    base = {name: getattr(good, name) for name in fields} | {"temperature": 2.0}

    def made(**changes: object) -> TeacherTargets:
        return TeacherTargets(**{**base, **changes})  # type: ignore[arg-type]

    def changed(tensor: Tensor, row: int, value: float) -> Tensor:
        tensor = tensor.clone()
        tensor[row] = value
        return tensor

    for pattern, change in (
        (r"shape \[5, 4\].*got \[5, 3\]", {"logprobs_NK": good.logprobs_NK[:, :3]}),
        (r"shape \[5\].*got \[4\]", {"tail_logprob_N": good.tail_logprob_N[:4]}),
        (r"int64, got torch.int32", {"ids_NK": good.ids_NK.int()}),
        (r"float32, got torch.bfloat16", {"logprobs_NK": good.logprobs_NK.bfloat16()}),
        (r"above 0, got 0", {"temperature": 0.0}),
        (r"above 0, got nan", {"temperature": math.nan}),
    ):
        with pytest.raises(ValueError, match=pattern):
            made(**change)
    for pattern, change in (
        ("1 of 5 rows.*vocabulary of 11.*row 2", {"ids_NK": changed(good.ids_NK, 2, V)}),
        ("1 of 5 rows.*vocabulary of 11.*row 0", {"token_ids_N": changed(good.token_ids_N, 0, -1)}),
        ("twice.*row 3", {"ids_NK": changed(good.ids_NK, 3, 1)}),
        ("not finite.*row 4", {"logprobs_NK": changed(good.logprobs_NK, 4, math.nan)}),
        ("not finite.*row 1", {"tail_logprob_N": changed(good.tail_logprob_N, 1, -math.inf)}),
        ("temperature 3.0 that is not 1", {"temperature": 3.0}),
    ):
        with pytest.raises(ValueError, match=pattern):
            made(**change).check(V)
    with pytest.raises(ValueError, match="outside the vocabulary of 10"):
        teacher_targets(logits(N, V, 1), V).check(V - 1)


def test_the_tail_of_candidates_is_right_down_to_its_resolution_and_never_a_penalty_of_rounding():
    tails = torch.tensor([0.5, 1e-3, 1e-5, 1e-9, 0.0], dtype=torch.float64)
    probs = torch.stack([(1 - tails) * 0.7, (1 - tails) * 0.3], 1)
    targets = TeacherTargets.from_candidates(
        torch.tensor([[0, 1]] * 5), probs.log().float(), torch.zeros(5), vocab_size=V
    )
    found = targets.tail_logprob_N.double().exp()
    torch.testing.assert_close(found[:3], tails[:3], rtol=2e-2, atol=0)
    torch.testing.assert_close(found[3:], torch.full((2,), CANDIDATE_TAIL_RESOLUTION).double(), rtol=1e-5, atol=0)
    targets.check(V)
    everything = TeacherTargets.from_candidates(
        torch.tensor([[0, 1]] * 5), probs.log().float(), torch.zeros(5), vocab_size=2
    )
    assert (everything.tail_logprob_N == TAIL_FLOOR).all()
    with pytest.raises(ValueError, match=r"row 0: candidates have a mass of 1\.4"):
        TeacherTargets.from_candidates(
            torch.tensor([[0, 0]]), torch.tensor([[0.7, 0.7]]).log(), torch.zeros(1), vocab_size=V
        )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_candidates_give_the_bucketed_loss_of_full_logits_with_an_exact_normaliser(temperature):
    student, teacher = both()
    ids = student.topk(K, -1).indices
    exact = teacher_targets(teacher, K, temperature, ids)
    derived = TeacherTargets.from_candidates(
        ids, exact.logprobs_NK.float(), exact.log_normalizer_N.float(), vocab_size=V, temperature=temperature
    )
    torch.testing.assert_close(soft_loss(student, derived), soft_loss(student, exact), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "pattern"),
    [
        ({"loss": "kl"}, "forward_kl, reverse_kl, jsd.*got 'kl'"),
        ({"jsd_beta": -0.1}, r"got -0\.1"),
        ({"alpha": -1.0}, "got -1.0"),
        ({"beta": math.nan}, "nan"),
        ({"importance_clip": (2.0, 1.0)}, r"got \(2\.0, 1\.0\)"),
    ],
)
def test_an_objective_refuses_settings_that_make_no_sense(settings, pattern):
    with pytest.raises(ValueError, match=pattern):
        Objective(**settings)
