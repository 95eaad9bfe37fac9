"""The steps of `kernels.Kernels` in Triton: each reads a block once, at the speed of memory.

Importing this module needs Triton. Legend: N positions, B ids of a block, K ids of the support.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kernels import FullSlopes, FullSums, Places, Slopes, Sums

_TILE = 4096
"""Logits that one program holds in registers at a time."""


class TritonKernels:
    """See `kernels.Kernels`; for CUDA tensors in float32, bfloat16 or float16, or any under TRITON_INTERPRET=1."""

    def absorb(self, block_NB: Tensor, first: int, real: int, places: Places, sums: Sums, temperature: float) -> None:
        """See `kernels.Kernels`."""
        n, k = places.ids_NK.shape
        if not n:
            return
        with torch.cuda.device_of(block_NB):
            _absorb[(n,)](
                block_NB, places.ids_NK, places.tokens_N, sums.support_NK, sums.token_N, sums.max_N, sums.mass_N,
                sums.moment_N, sums.mass_1_N, block_NB.stride(0), first, real, k, 1 / temperature,
                IDS=_ids(k), TILE=_tile(block_NB), num_warps=8,
            )  # fmt: skip

    def differentiate(
        self, block_NB: Tensor, first: int, real: int, places: Places, slopes: Slopes, temperature: float
    ) -> None:
        """See `kernels.Kernels`."""
        n, k = places.ids_NK.shape
        slope_1_N, shift_1_N = slopes.slope_1_N, slopes.shift_1_N
        two = slope_1_N is not None
        if not n:
            return
        with torch.cuda.device_of(block_NB):
            _differentiate[(n,)](
                block_NB, places.ids_NK, places.tokens_N, slopes.support_NK, slopes.token_N, slopes.slope_N,
                slopes.shift_N, slope_1_N if two else slopes.slope_N, shift_1_N if two else slopes.shift_N,
                block_NB.stride(0), first, real, block_NB.shape[1], k, 1 / temperature,
                IDS=_ids(k), TILE=_tile(block_NB), TWO=two, num_warps=8,
            )  # fmt: skip

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
        """See `kernels.Kernels`."""
        if len(block_NB):
            with torch.cuda.device_of(block_NB):
                _compare[(len(block_NB),)](
                    block_NB, teacher_NB, tokens_N, *list(vars(sums).values())[:10], block_NB.stride(0),
                    teacher_NB.stride(0), first, real, 1 / temperature, TILE=_tile(block_NB), num_warps=8,
                )  # fmt: skip

    def mix(
        self, block_NB: Tensor, teacher_NB: Tensor, real: int, sums: FullSums, slopes: FullSlopes, temperature: float
    ) -> None:
        """See `kernels.Kernels`."""
        if len(block_NB):
            with torch.cuda.device_of(block_NB):
                _mix[(len(block_NB),)](
                    block_NB, teacher_NB, sums.mixed_N, sums.teacher_mixed_N, slopes.shift_N, slopes.teacher_shift_N,
                    block_NB.stride(0), teacher_NB.stride(0), real, 1 / temperature, slopes.b,
                    TILE=_tile(block_NB), num_warps=8,
                )  # fmt: skip

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
        """See `kernels.Kernels`."""
        if not len(block_NB):
            return
        slope_1_N = slopes.slope_1_N
        with torch.cuda.device_of(block_NB):
            _differentiate_full[(len(block_NB),)](
                block_NB, teacher_NB, tokens_N, slopes.slope_N, slopes.shift_N, slopes.teacher_shift_N, slopes.value_N,
                slopes.slope_N if slope_1_N is None else slope_1_N, slopes.shift_1_N, block_NB.stride(0),
                teacher_NB.stride(0), first, real, block_NB.shape[1], 1 / temperature, slopes.b,
                KIND=_KINDS.index(slopes.kind), TILE=_tile(block_NB), TWO=slope_1_N is not None, num_warps=8,
            )  # fmt: skip


_KINDS = ("forward_kl", "reverse_kl", "jsd")


def _ids(k: int) -> int:
    return int(triton.next_power_of_2(max(k, 1)))


def _tile(block_NB: Tensor) -> int:
    return min(_TILE, int(triton.next_power_of_2(block_NB.shape[1])))


@triton.jit
def _read(here, begin, real, TILE: tl.constexpr):
    """Logits begin..begin+TILE-1 of a row in float32, -inf from `real` on."""
    column_B = begin + tl.arange(0, TILE)
    # A mask on every column would keep the loads of a tile from being vectors; only the last tile needs it.
    if begin + TILE <= real:
        z_B = tl.load(here + column_B)
    else:
        z_B = tl.load(here + column_B, mask=column_B < real, other=-float("inf"))
    return z_B.to(tl.float32)


@triton.jit
def _write(here, begin, real, width, g_B, TILE: tl.constexpr):
    column_B = begin + tl.arange(0, TILE)
    if begin + TILE <= real:
        tl.store(here + column_B, g_B.to(here.dtype.element_ty))
    else:
        tl.store(here + column_B, g_B.to(here.dtype.element_ty), mask=column_B < width)


# Numbers that differ from block to block are not compiled in: only dtype, alignment and sizes make a new kernel.
@triton.jit(do_not_specialize=["first", "real", "k"])
def _absorb(
    block, ids, tokens, support, token, maxima, masses, moments, masses_1, stride, first, real, k, scale,
    IDS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    here = block + row * stride
    at = tl.load(tokens + row) - first
    if (at >= 0) & (at < real):
        tl.store(token + row, tl.load(here + at).to(tl.float32))
    i_K = tl.arange(0, IDS)
    at_K = tl.load(ids + row * k + i_K, mask=i_K < k, other=-1) - first
    inside_K = (at_K >= 0) & (at_K < real) & (i_K < k)
    z_K = tl.load(here + at_K, mask=inside_K, other=0.0)
    tl.store(support + row * k + i_K, z_K.to(tl.float32), mask=inside_K)
    tl.debug_barrier()
    tl.store(here + at_K, tl.full([IDS], -float("inf"), z_K.dtype), mask=inside_K)
    tl.debug_barrier()
    maximum = tl.load(maxima + row)
    mass = tl.load(masses + row)
    moment = tl.load(moments + row)
    mass_1 = tl.load(masses_1 + row)
    for begin in range(0, real, TILE):
        z_B = _read(here, begin, real, TILE)
        higher = tl.maximum(maximum, tl.max(z_B, axis=0))
        base = tl.where(higher == -float("inf"), 0.0, higher)
        moved = tl.where(maximum == -float("inf"), 0.0, maximum - base)
        above_B = z_B - base
        scaled_B = above_B * scale
        p_B = tl.exp(scaled_B)
        shrunk = tl.exp(moved * scale)
        moment = (moment + mass * moved * scale) * shrunk
        moment += tl.sum(p_B * tl.where(z_B == -float("inf"), 0.0, scaled_B), axis=0)
        mass = mass * shrunk + tl.sum(p_B, axis=0)
        mass_1 = mass_1 * tl.exp(moved) + tl.sum(tl.exp(above_B), axis=0)
        maximum = higher
    tl.store(maxima + row, maximum)
    tl.store(masses + row, mass)
    tl.store(moments + row, moment)
    tl.store(masses_1 + row, mass_1)


@triton.jit(do_not_specialize=["first", "real", "k"])
def _differentiate(
    block, ids, tokens, support, token, slopes, shifts, slopes_1, shifts_1, stride, first, real, width, k, scale,
    IDS: tl.constexpr, TILE: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    here = block + row * stride
    slope = tl.load(slopes + row)
    shift = tl.load(shifts + row)
    slope_1 = tl.load(slopes_1 + row)
    shift_1 = tl.load(shifts_1 + row)
    for begin in range(0, width, TILE):
        z_B = _read(here, begin, real, TILE)
        g_B = slope * tl.exp(z_B * scale - shift)
        if TWO:
            g_B += slope_1 * tl.exp(z_B - shift_1)
        _write(here, begin, real, width, g_B, TILE)
    tl.debug_barrier()
    i_K = tl.arange(0, IDS)
    at_K = tl.load(ids + row * k + i_K, mask=i_K < k, other=-1) - first
    inside_K = (at_K >= 0) & (at_K < real) & (i_K < k)
    g_K = tl.load(support + row * k + i_K, mask=inside_K, other=0.0)
    tl.store(here + at_K, g_K.to(block.dtype.element_ty), mask=inside_K)
    at = tl.load(tokens + row) - first
    if (at >= 0) & (at < real):
        tl.store(here + at, tl.load(token + row).to(block.dtype.element_ty))


@triton.jit(do_not_specialize=["first", "real"])
def _compare(
    block, teacher, tokens, token, maxima, masses, masses_1, owns, crosses, teacher_maxima, teacher_masses,
    teacher_owns, teacher_crosses, stride, teacher_stride, first, real, scale,
    TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    here = block + row * stride
    there = teacher + row * teacher_stride
    at = tl.load(tokens + row) - first
    if (at >= 0) & (at < real):
        tl.store(token + row, tl.load(here + at).to(tl.float32))
    z_max = tl.load(maxima + row)
    mass = tl.load(masses + row)
    mass_1 = tl.load(masses_1 + row)
    own = tl.load(owns + row)
    cross = tl.load(crosses + row)
    y_max = tl.load(teacher_maxima + row)
    t_mass = tl.load(teacher_masses + row)
    t_own = tl.load(teacher_owns + row)
    t_cross = tl.load(teacher_crosses + row)
    for begin in range(0, real, TILE):
        z_B = _read(here, begin, real, TILE)
        y_B = _read(there, begin, real, TILE)
        z_top = tl.maximum(z_max, tl.max(z_B, axis=0))
        y_top = tl.maximum(y_max, tl.max(y_B, axis=0))
        z_moved = tl.where(z_max == -float("inf"), 0.0, z_max - z_top) * scale
        y_moved = tl.where(y_max == -float("inf"), 0.0, y_max - y_top) * scale
        inside_B = begin + tl.arange(0, TILE) < real
        above_B = tl.where(inside_B, z_B - z_top, 0.0)
        over_B = tl.where(inside_B, y_B - y_top, 0.0) * scale
        p_1_B = tl.where(inside_B, tl.exp(above_B), 0.0)
        above_B *= scale
        p_B = tl.where(inside_B, tl.exp(above_B), 0.0)
        q_B = tl.where(inside_B, tl.exp(over_B), 0.0)
        shrunk = tl.exp(z_moved)
        t_shrunk = tl.exp(y_moved)
        own = (own + mass * z_moved) * shrunk + tl.sum(p_B * above_B, axis=0)
        cross = (cross + mass * y_moved) * shrunk + tl.sum(p_B * over_B, axis=0)
        t_own = (t_own + t_mass * y_moved) * t_shrunk + tl.sum(q_B * over_B, axis=0)
        t_cross = (t_cross + t_mass * z_moved) * t_shrunk + tl.sum(q_B * above_B, axis=0)
        mass = mass * shrunk + tl.sum(p_B, axis=0)
        t_mass = t_mass * t_shrunk + tl.sum(q_B, axis=0)
        mass_1 = mass_1 * tl.exp(z_moved / scale) + tl.sum(p_1_B, axis=0)
        z_max = z_top
        y_max = y_top
    tl.store(maxima + row, z_max)
    tl.store(masses + row, mass)
    tl.store(masses_1 + row, mass_1)
    tl.store(owns + row, own)
    tl.store(crosses + row, cross)
    tl.store(teacher_maxima + row, y_max)
    tl.store(teacher_masses + row, t_mass)
    tl.store(teacher_owns + row, t_own)
    tl.store(teacher_crosses + row, t_cross)


@triton.jit
def _log_mix(s_B, t_B, b):
    """log(b e^t + (1 - b) e^s)."""
    high_B = tl.maximum(s_B, t_B)
    return high_B + tl.log(b * tl.exp(t_B - high_B) + (1 - b) * tl.exp(s_B - high_B))


@triton.jit(do_not_specialize=["real"])
def _mix(
    block, teacher, mixed, teacher_mixed, shifts, teacher_shifts, stride, teacher_stride, real, scale, b,
    TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    shift = tl.load(shifts + row)
    teacher_shift = tl.load(teacher_shifts + row)
    own = tl.load(mixed + row)
    against = tl.load(teacher_mixed + row)
    for begin in range(0, real, TILE):
        s_B = _read(block + row * stride, begin, real, TILE) * scale - shift
        t_B = _read(teacher + row * teacher_stride, begin, real, TILE) * scale - teacher_shift
        inside_B = begin + tl.arange(0, TILE) < real
        s_B = tl.where(inside_B, s_B, 0.0)
        t_B = tl.where(inside_B, t_B, 0.0)
        l_B = _log_mix(s_B, t_B, b)
        own += tl.sum(tl.where(inside_B, tl.exp(s_B) * (s_B - l_B), 0.0), axis=0)
        against += tl.sum(tl.where(inside_B, tl.exp(t_B) * (t_B - l_B), 0.0), axis=0)
    tl.store(mixed + row, own)
    tl.store(teacher_mixed + row, against)


@triton.jit(do_not_specialize=["first", "real"])
def _differentiate_full(
    block, teacher, tokens, slopes, shifts, teacher_shifts, values, slopes_1, shifts_1, stride, teacher_stride, first,
    real, width, scale, b,
    KIND: tl.constexpr, TILE: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    here = block + row * stride
    slope = tl.load(slopes + row)
    shift = tl.load(shifts + row)
    teacher_shift = tl.load(teacher_shifts + row)
    value = tl.load(values + row)
    slope_1 = tl.load(slopes_1 + row)
    shift_1 = tl.load(shifts_1 + row)
    at = tl.load(tokens + row) - first
    for begin in range(0, width, TILE):
        column_B = begin + tl.arange(0, TILE)
        inside_B = column_B < real
        z_B = tl.where(inside_B, _read(here, begin, real, TILE), 0.0)
        y_B = tl.where(inside_B, _read(teacher + row * teacher_stride, begin, real, TILE), 0.0)
        s_B = z_B * scale - shift
        t_B = y_B * scale - teacher_shift
        if KIND == 0:
            g_B = tl.exp(s_B) - tl.exp(t_B)
        elif KIND == 1:
            g_B = tl.exp(s_B) * (s_B - t_B - value)
        else:
            g_B = (1 - b) * tl.exp(s_B) * (s_B - _log_mix(s_B, t_B, b) - value)
        g_B *= slope
        if TWO:
            g_B += slope_1 * (tl.exp(z_B - shift_1) - tl.where(column_B == at, 1.0, 0.0))
        _write(here, begin, real, width, tl.where(inside_B, g_B, 0.0), TILE)
