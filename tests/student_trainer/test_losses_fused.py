"""The fused losses equal the chunked ones, in blocks of the vocabulary and in chunks of positions; their kernels in
Triton equal those in PyTorch: compiled on a GPU, elsewhere in Triton's interpreter.

Legend: N positions, K ids of the support, H and W hidden sizes, V logits, of which R are real.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from student_trainer.losses import (
    SAMPLED_LOSSES,
    SOFT_LOSSES,
    FullTargets,
    Head,
    Objective,
    distillation_loss,
    fused,
)
from student_trainer.losses.fused import Fused, fused_loss
from student_trainer.losses.head import Projector
from student_trainer.losses.importance import ImportanceWeights
from student_trainer.losses.kernels import TorchKernels, disagreement
from tests.student_trainer.test_losses_chunked import OBJECTIVES, H, K, N, R, V, name, random, said_by

W = 5
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(params=["some", "all"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """`some`: room for the logits of four positions: computed in chunks of four where the head is frozen, and twice, in
    blocks of five ids, where it trains; `all`: room for all.
    """
    monkeypatch.setattr(fused, "ONCE_BYTES", (4 if request.param == "some" else N) * 8 * V)
    monkeypatch.setattr(fused, "BLOCK_IDS", 5)
    monkeypatch.setattr(fused, "BLOCK_BYTES", 1)
    return str(request.param)


def inputs(*, frozen: bool, bias: bool) -> tuple[Tensor, Head]:
    hidden_NH = random(N, H, seed=1).requires_grad_()
    weight_VH, bias_V = random(V, H, seed=2), random(V, seed=3) if bias else None
    for tensor in (weight_VH, bias_V):
        if tensor is not None:
            tensor.requires_grad_(not frozen)
    return hidden_NH, Head(weight_VH, bias_V, R)


def check(hidden_NH: Tensor, head: Head, targets: object, objective: Objective, *, old: bool = False) -> None:
    """Values, metrics and gradients of both ways, at 1e-10."""
    weights_N = random(N, seed=9).abs()
    rollout_N = -random(N, seed=10).abs() if old else None
    begins_N = torch.arange(N) % 5 == 0 if old and not objective.on_sampled_token else None
    given = [t for t in (hidden_NH, head.weight_VH, head.bias_V) if t is not None and t.requires_grad]
    want = distillation_loss(
        hidden_NH, head, targets, objective, weights_N=weights_N, rollout_logprobs_N=rollout_N, begins_N=begins_N
    )  # type: ignore[arg-type]
    want_gradients = torch.autograd.grad(want.loss, given)
    importance = None
    if rollout_N is not None:
        importance = ImportanceWeights(rollout_N, begins_N, objective.importance_clip)
    with torch.no_grad():
        projector = Projector(hidden_NH, head, R)
        found: Fused = fused_loss(projector, targets, objective, weights_N, importance, TorchKernels(), True)  # type: ignore[arg-type]
    torch.testing.assert_close((found.values_N * weights_N).sum(), want.loss.detach(), rtol=1e-10, atol=1e-10)
    for gradient, other in zip([g for g in found.gradients if g is not None], want_gradients, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-10, atol=1e-10)
    for f in fields(found.metrics):
        mine, theirs = getattr(found.metrics, f.name), getattr(want.metrics, f.name)
        assert (mine is None) == (theirs is None), f.name
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6, msg=f.name)


CASES = [(o, t, k, bias) for o in OBJECTIVES for t, k, bias in ((2.0, K, True), (1.0, K, False), (0.6, R, False))]
CASES += [(o, 3.0, 0, False) for o in OBJECTIVES if o.loss in SAMPLED_LOSSES]


@pytest.mark.parametrize(("objective", "temperature", "k", "bias"), CASES)
def test_values_metrics_and_gradients_are_the_chunked_ones(
    way: str, objective: Objective, temperature: float, k: int, bias: bool
) -> None:
    targets = said_by(3 * random(N, R, seed=4), k, temperature)
    for frozen in (False, True) if way == "some" else (False,):
        check(*inputs(frozen=frozen, bias=bias), targets, objective)


@pytest.mark.parametrize("objective", [o for o in OBJECTIVES if o.loss in SOFT_LOSSES and o.alpha], ids=name)
@pytest.mark.parametrize(("temperature", "bias"), [(2.0, True), (1.0, False)])
def test_whole_distributions_give_the_chunked_values_too(
    way: str, objective: Objective, temperature: float, bias: bool
) -> None:
    head = Head(random(R, W, seed=12), random(R, seed=13) if bias else None)
    tokens_N = said_by(random(N, R, seed=4)).token_ids_N
    targets = FullTargets(random(N, W, seed=11), head, temperature, tokens_N)
    for frozen in (False, True) if way == "some" else (False,):
        check(*inputs(frozen=frozen, bias=bias), targets, objective)


@pytest.mark.parametrize("loss", ["reverse_kl", "policy_gradient", "reverse_kl_sampled_tail"])
def test_importance_weights_run_over_chunks_as_in_the_chunked_way(way: str, loss: str) -> None:
    check(*inputs(frozen=True, bias=False), said_by(random(N, R, seed=4)), Objective(loss), old=True)
    check(*inputs(frozen=False, bias=False), said_by(random(N, R, seed=4)), Objective(loss), old=True)


def test_old_rollouts_weigh_whole_distributions(way: str) -> None:
    tokens_N = said_by(random(N, R, seed=4)).token_ids_N
    targets = FullTargets(random(N, W, seed=11), Head(random(R, W, seed=12)), 2.0, tokens_N)
    check(*inputs(frozen=False, bias=False), targets, Objective("forward_kl"), old=True)


def test_a_disagreement_of_kernels_is_found() -> None:
    class Wrong(TorchKernels):
        def absorb(self, *arguments: object) -> None:
            super().absorb(*arguments)  # type: ignore[arg-type]
            arguments[4].mass_N.mul_(1.001)  # type: ignore[attr-defined]

    assert disagreement(TorchKernels(), torch.device("cpu")) == ""
    assert disagreement(Wrong(), torch.device("cpu")).startswith("mass_N differs by")


def test_no_kernels_are_taken_without_a_gpu() -> None:
    assert fused.kernels_for(torch.device("cpu")) is None


INTERPRETED = """
import torch
from student_trainer.losses.kernels import disagreement
from student_trainer.losses.kernels_triton import TritonKernels
print(repr(disagreement(TritonKernels(), torch.device("cpu"))))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the compiled kernels are tested instead")
def test_the_triton_kernels_agree_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    ran = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    if "only 0-dimensional arrays" in ran.stderr:
        pytest.skip("the interpreter of this Triton does not work with this NumPy")
    assert ran.stdout == "''\n", ran.stderr


@needs_cuda
def test_a_gpu_gets_the_triton_kernels() -> None:
    from student_trainer.losses.kernels_triton import TritonKernels

    assert isinstance(fused.kernels_for(torch.device("cuda")), TritonKernels)


@needs_cuda
@pytest.mark.parametrize("objective", OBJECTIVES, ids=name)
def test_a_gpu_gives_the_gradients_of_the_chunked_way(objective: Objective) -> None:
    hidden_NH, weight_VH = random(N, H, seed=1).float().cuda(), random(V, H, seed=2).float().cuda()
    targets = said_by((3 * random(N, R, seed=4)).float(), K, 2.0).to("cuda")
    found = []
    for chunk_size in (None, 4):
        x, w = hidden_NH.clone().requires_grad_(), weight_VH.clone().requires_grad_()
        distillation_loss(x, Head(w, None, R), targets, objective, chunk_size=chunk_size).loss.backward()
        found.append((x.grad, w.grad))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
