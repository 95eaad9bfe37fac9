"""What the fused losses do with a block of logits, in plain PyTorch: the reference of the Triton kernels.

A block is float[N,B], the logits of N positions for the ids first..first+B-1, of which the first `real` are the
vocabulary's and the rest padding. `absorb` reads what a loss on a support needs of it and adds to sums over all blocks;
`differentiate` turns it, in place, into the gradient by these logits. `compare`, `mix` and `differentiate_full` are
their like for a student's and a teacher's block together. Legend: N positions, B ids of a block, K ids of the support;
T is the loss's temperature.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Places:
    """Where to look: int32[N,K] distinct ids of the support, and int32[N] tokens, -1 where there is none."""

    ids_NK: Tensor
    tokens_N: Tensor


@dataclass(frozen=True, eq=False)
class Sums:
    """What is known of N positions' logits z, updated block by block; float32 (float64 for float64).

    `support_NK` and `token_N` are logits. Over the complement of the support, with m its largest logit so far:
    `max_N` m (-inf: nothing yet), `mass_N` sum exp((z - m) / T), `moment_N` sum exp((z - m) / T) (z - m) / T,
    `mass_1_N` sum exp(z - m).
    """

    support_NK: Tensor
    token_N: Tensor
    max_N: Tensor
    mass_N: Tensor
    moment_N: Tensor
    mass_1_N: Tensor

    @staticmethod
    def empty(places: Places, dtype: torch.dtype) -> Sums:
        """Before the first block."""
        n, k = places.ids_NK.shape
        numbers = torch.zeros(5, n, dtype=dtype, device=places.ids_NK.device)
        numbers[1] = -torch.inf
        return Sums(numbers.new_zeros(n, k), *numbers)


@dataclass(frozen=True, eq=False)
class Slopes:
    """A gradient by logits z: slope_N exp(z / T - shift_N) + slope_1_N exp(z - shift_1_N), except that it is
    `support_NK` at the support and `token_N` at a token outside of it. The terms at 1 may both be None. Dtypes as in
    `Sums`.
    """

    support_NK: Tensor
    token_N: Tensor
    slope_N: Tensor
    shift_N: Tensor
    slope_1_N: Tensor | None
    shift_1_N: Tensor | None


@dataclass(frozen=True, eq=False)
class FullSums:
    """What is known of N positions' logits, student's z and teacher's y, updated block by block; float32 or better.

    With m the largest z so far: `token_N` z of the token, `max_N` m, `mass_N` sum exp((z - m) / T), `mass_1_N`
    sum exp(z - m), `own_N` sum exp((z - m) / T) (z - m) / T. With c the largest y, `teacher_max_N`: `teacher_mass_N`
    sum exp((y - c) / T), `teacher_own_N` sum exp((y - c) / T) (y - c) / T. `cross_N` is sum exp((z - m) / T)
    (y - c) / T, `teacher_cross_N` sum exp((y - c) / T) (z - m) / T. `mixed_N` and `teacher_mixed_N` are the sums of
    `mix`.
    """

    token_N: Tensor
    max_N: Tensor
    mass_N: Tensor
    mass_1_N: Tensor
    own_N: Tensor
    cross_N: Tensor
    teacher_max_N: Tensor
    teacher_mass_N: Tensor
    teacher_own_N: Tensor
    teacher_cross_N: Tensor
    mixed_N: Tensor
    teacher_mixed_N: Tensor

    @staticmethod
    def empty(n: int, dtype: torch.dtype, device: torch.device) -> FullSums:
        """Before the first block."""
        numbers = torch.zeros(12, n, dtype=dtype, device=device)
        numbers[1] = numbers[6] = -torch.inf
        return FullSums(*numbers)


@dataclass(frozen=True, eq=False)
class FullSlopes:
    """A gradient by the student's logits z, with the log-softmaxes s = z / T - `shift_N` and
    t = y / T - `teacher_shift_N`:

        slope_N * D + slope_1_N * (exp(z - shift_1_N) - [the token]),
        D = e^s - e^t ("forward_kl"), e^s (s - t - value_N) ("reverse_kl"), or, with l = log(b e^t + (1 - b) e^s),
        (1 - b) e^s (s - l - value_N) ("jsd")

    `slope_1_N` may be None: no such term. `b` is that of the JSD. Dtypes as in `FullSums`.
    """

    kind: str
    b: float
    slope_N: Tensor
    shift_N: Tensor
    teacher_shift_N: Tensor
    value_N: Tensor
    slope_1_N: Tensor | None
    shift_1_N: Tensor


class Kernels(Protocol):
    """The steps; see the module."""

    def absorb(self, block_NB: Tensor, first: int, real: int, places: Places, sums: Sums, temperature: float) -> None:
        """Adds a block to `sums`, and leaves -inf in it at the support's places."""
        ...

    def differentiate(
        self, block_NB: Tensor, first: int, real: int, places: Places, slopes: Slopes, temperature: float
    ) -> None:
        """Overwrites a block by the gradient; tokens that are in the support must be -1 in `places`."""
        ...

    def compare(
        self,
        block_NB: Tensor,
        teacher_NB: Tensor,
        first: int,
        real: int,
        tokens_N: Tensor,
        sums: FullSums,
        temperature: float,
    ) -> None:
        """Adds a student's and a teacher's block to `sums`; int32[N] tokens, -1 where there is none."""
        ...

    def mix(
        self, block_NB: Tensor, teacher_NB: Tensor, real: int, sums: FullSums, slopes: FullSlopes, temperature: float
    ) -> None:
        """Adds sum e^s (s - l) to `mixed_N` and sum e^t (t - l) to `teacher_mixed_N`, in the words of FullSlopes."""
        ...

    def differentiate_full(
        self,
        block_NB: Tensor,
        teacher_NB: Tensor,
        first: int,
        real: int,
        tokens_N: Tensor,
        slopes: FullSlopes,
        temperature: float,
    ) -> None:
        """Overwrites the student's block by the gradient."""
        ...


class TorchKernels:
    """`Kernels` written to be read, for any device."""

    def absorb(self, block_NB: Tensor, first: int, real: int, places: Places, sums: Sums, temperature: float) -> None:
        """See `Kernels`."""
        z_NB = block_NB[:, :real]
        rows_N, _, columns_N = _inside(places.tokens_N[:, None], first, real)
        sums.token_N[rows_N] = z_NB[rows_N, columns_N].to(sums.token_N.dtype)
        rows_S, k_S, columns_S = _inside(places.ids_NK, first, real)
        sums.support_NK[rows_S, k_S] = z_NB[rows_S, columns_S].to(sums.support_NK.dtype)
        z_NB[rows_S, columns_S] = -torch.inf
        wide_NB = z_NB.to(sums.max_N.dtype)
        max_N = torch.maximum(sums.max_N, wide_NB.amax(1))
        base_N = max_N.masked_fill(max_N == -torch.inf, 0.0)
        for at, mass_N, moment_N in ((temperature, sums.mass_N, sums.moment_N), (1.0, sums.mass_1_N, None)):
            moved_N = ((sums.max_N - base_N) / at).masked_fill(sums.max_N == -torch.inf, 0.0)
            above_NB = (wide_NB - base_N[:, None]) / at
            p_NB = above_NB.exp()
            if moment_N is not None:
                moment_N.add_(mass_N * moved_N).mul_(moved_N.exp())
                moment_N += (p_NB * above_NB.masked_fill(above_NB == -torch.inf, 0.0)).sum(1)
            mass_N.mul_(moved_N.exp()).add_(p_NB.sum(1))
        sums.max_N.copy_(max_N)

    def differentiate(
        self, block_NB: Tensor, first: int, real: int, places: Places, slopes: Slopes, temperature: float
    ) -> None:
        """See `Kernels`."""
        block_NB[:, real:] = 0
        z_NB = block_NB[:, :real].to(slopes.slope_N.dtype)
        gradient_NB = slopes.slope_N[:, None] * (z_NB / temperature - slopes.shift_N[:, None]).exp()
        if slopes.slope_1_N is not None and slopes.shift_1_N is not None:
            gradient_NB += slopes.slope_1_N[:, None] * (z_NB - slopes.shift_1_N[:, None]).exp()
        rows_S, k_S, columns_S = _inside(places.ids_NK, first, real)
        gradient_NB[rows_S, columns_S] = slopes.support_NK[rows_S, k_S]
        rows_N, _, columns_N = _inside(places.tokens_N[:, None], first, real)
        gradient_NB[rows_N, columns_N] = slopes.token_N[rows_N]
        block_NB[:, :real] = gradient_NB

    def compare(
        self,
        block_NB: Tensor,
        teacher_NB: Tensor,
        first: int,
        real: int,
        tokens_N: Tensor,
        sums: FullSums,
        temperature: float,
    ) -> None:
        """See `Kernels`."""
        dtype = sums.max_N.dtype
        z_NB, y_NB = block_NB[:, :real].to(dtype), teacher_NB[:, :real].to(dtype)
        rows_N, _, columns_N = _inside(tokens_N[:, None], first, real)
        sums.token_N[rows_N] = z_NB[rows_N, columns_N]
        max_N, top_N = torch.maximum(sums.max_N, z_NB.amax(1)), torch.maximum(sums.teacher_max_N, y_NB.amax(1))
        # How far the sums so far were above the new maxima; they are empty where that is infinite.
        z_moved_N, y_moved_N = _moved(sums.max_N, max_N) / temperature, _moved(sums.teacher_max_N, top_N) / temperature
        above_NB, over_NB = (z_NB - max_N[:, None]) / temperature, (y_NB - top_N[:, None]) / temperature
        p_NB, q_NB = above_NB.exp(), over_NB.exp()
        shrunk_N, teacher_shrunk_N = z_moved_N.exp(), y_moved_N.exp()
        for total_N, mass_N, by_N, factor_N, more_NB in (
            (sums.own_N, sums.mass_N, z_moved_N, shrunk_N, p_NB * above_NB),
            (sums.cross_N, sums.mass_N, y_moved_N, shrunk_N, p_NB * over_NB),
            (sums.teacher_own_N, sums.teacher_mass_N, y_moved_N, teacher_shrunk_N, q_NB * over_NB),
            (sums.teacher_cross_N, sums.teacher_mass_N, z_moved_N, teacher_shrunk_N, q_NB * above_NB),
        ):
            total_N.add_(mass_N * by_N).mul_(factor_N).add_(more_NB.sum(1))
        sums.mass_N.mul_(shrunk_N).add_(p_NB.sum(1))
        sums.teacher_mass_N.mul_(teacher_shrunk_N).add_(q_NB.sum(1))
        sums.mass_1_N.mul_((z_moved_N * temperature).exp()).add_((above_NB * temperature).exp().sum(1))
        sums.max_N.copy_(max_N)
        sums.teacher_max_N.copy_(top_N)

    def mix(
        self, block_NB: Tensor, teacher_NB: Tensor, real: int, sums: FullSums, slopes: FullSlopes, temperature: float
    ) -> None:
        """See `Kernels`."""
        s_NB, t_NB = _log_softmaxes(block_NB, teacher_NB, real, slopes, temperature)
        l_NB = torch.logaddexp(t_NB + math.log(slopes.b), s_NB + math.log1p(-slopes.b))
        sums.mixed_N.add_((s_NB.exp() * (s_NB - l_NB)).sum(1))
        sums.teacher_mixed_N.add_((t_NB.exp() * (t_NB - l_NB)).sum(1))

    def differentiate_full(
        self,
        block_NB: Tensor,
        teacher_NB: Tensor,
        first: int,
        real: int,
        tokens_N: Tensor,
        slopes: FullSlopes,
        temperature: float,
    ) -> None:
        """See `Kernels`."""
        s_NB, t_NB = _log_softmaxes(block_NB, teacher_NB, real, slopes, temperature)
        if slopes.kind == "forward_kl":
            gradient_NB = s_NB.exp() - t_NB.exp()
        elif slopes.kind == "reverse_kl":
            gradient_NB = s_NB.exp() * (s_NB - t_NB - slopes.value_N[:, None])
        else:
            l_NB = torch.logaddexp(t_NB + math.log(slopes.b), s_NB + math.log1p(-slopes.b))
            gradient_NB = (1 - slopes.b) * s_NB.exp() * (s_NB - l_NB - slopes.value_N[:, None])
        gradient_NB *= slopes.slope_N[:, None]
        if slopes.slope_1_N is not None:
            z_NB = block_NB[:, :real].to(gradient_NB.dtype)
            gradient_NB += slopes.slope_1_N[:, None] * (z_NB - slopes.shift_1_N[:, None]).exp()
            rows_N, _, columns_N = _inside(tokens_N[:, None], first, real)
            gradient_NB[rows_N, columns_N] -= slopes.slope_1_N[rows_N]
        block_NB[:, :real] = gradient_NB
        block_NB[:, real:] = 0


def _moved(before_N: Tensor, after_N: Tensor) -> Tensor:
    return (before_N - after_N).masked_fill(before_N == -torch.inf, 0.0)


def _log_softmaxes(
    block_NB: Tensor, teacher_NB: Tensor, real: int, slopes: FullSlopes, temperature: float
) -> tuple[Tensor, Tensor]:
    dtype = slopes.shift_N.dtype
    s_NB = block_NB[:, :real].to(dtype) / temperature - slopes.shift_N[:, None]
    return s_NB, teacher_NB[:, :real].to(dtype) / temperature - slopes.teacher_shift_N[:, None]


def real_of(columns: slice, vocab_size: int) -> int:
    """How many ids of a block are the vocabulary's."""
    return max(0, min(int(columns.stop), vocab_size) - int(columns.start))


def _inside(ids_NK: Tensor, first: int, real: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the ids that stand in a block: their rows, their places among K, and their columns in the block, int64."""
    rows, k = ((ids_NK >= first) & (ids_NK < first + real)).nonzero(as_tuple=True)
    return rows, k, ids_NK[rows, k].long() - first


def disagreement(kernels: Kernels, device: torch.device) -> str:
    """What `kernels` do otherwise than `TorchKernels` on a small case; empty where nothing."""
    generator = torch.Generator().manual_seed(0)
    n, k, width, real = 5, 3, 48, 37

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    z, y, t = 4 * random(n, width), 4 * random(n, width), 2.0
    ids = torch.stack([torch.randperm(real, generator=generator)[:k] for _ in range(n)]).int().to(device)
    places = Places(ids, torch.randint(real, (n,), generator=generator).int().to(device))
    slopes = Slopes(random(n, k), *random(5, n))
    kinds = [FullSlopes(kind, 0.3, *random(6, n)) for kind in ("forward_kl", "reverse_kl", "jsd")]
    found: list[dict[str, Tensor]] = []
    for tried in (TorchKernels(), kernels):
        sums, full, gradients = Sums.empty(places, torch.float32), FullSums.empty(n, torch.float32, device), []
        for first in (0, 16, 32):
            mine, yours = (logits[:, first : first + 16].clone() for logits in (z, y))
            size = min(16, real - first)
            tried.compare(mine, yours, first, size, places.tokens_N, full, t)
            tried.mix(mine, yours, size, full, kinds[2], t)
            for each in kinds:
                block = mine.clone()
                tried.differentiate_full(block, yours, first, size, places.tokens_N, each, t)
                gradients.append(block)
            tried.absorb(mine.clone(), first, size, places, sums, t)
            tried.differentiate(mine, first, size, places, slopes, t)
            gradients.append(mine)
        both = {**vars(sums), **{f"full {name}": value for name, value in vars(full).items()}}
        found.append({**both, "gradient": torch.cat(gradients, 1)})
    for name, want in found[0].items():
        worst = float(((found[1][name] - want).abs() / (1 + want.abs())).max())
        if not worst < 1e-4:
            return f"{name} differs by {worst:.2g}"
    return ""
