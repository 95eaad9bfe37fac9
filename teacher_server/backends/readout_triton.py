"""The two steps of `readout_blocks.Kernels` in Triton: the logits are read once, at the speed of memory.

Importing this module needs Triton. Legend: R rows, V columns, B blocks of SIZE columns, N temperatures, the first is 1.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from teacher_server.backends.readout_blocks import inverse

_TILE = 4096
"""Logits that one program holds in registers."""


class TritonKernels:
    """See `readout_blocks.Kernels`; for CUDA tensors, or any under TRITON_INTERPRET=1. V must be below 2**31."""

    def summarize(self, logits_RV: Tensor, size: int, temperatures: tuple[float, ...]) -> tuple[Tensor, Tensor]:
        """Maxima float32[R, B] and log-sums float32[R, N, B]."""
        r, v = _shape(logits_RV)
        n, blocks = len(temperatures), triton.cdiv(v, size)
        maxima_RB = torch.empty(r, blocks, device=logits_RV.device)
        sums_RNB = torch.empty(r, n, blocks, device=logits_RV.device)
        scales_N = maxima_RB if n == 1 else inverse(temperatures, logits_RV.device)  # not read for n = 1
        per_tile = _TILE // size
        tiles = triton.cdiv(blocks, per_tile)
        with torch.cuda.device_of(logits_RV):
            _summarize[(r * tiles,)](
                logits_RV, maxima_RB, sums_RNB, scales_N, logits_RV.stride(0), v, blocks, tiles, n,
                SIZE=size, PER_TILE=per_tile, num_warps=4,
            )  # fmt: skip
        return maxima_RB, sums_RNB

    def take(self, logits_RV: Tensor, blocks_RK: Tensor, size: int) -> Tensor:
        """float32[R, K * size]."""
        r, v = _shape(logits_RV)
        k = blocks_RK.shape[1]
        taken = torch.empty(r, k * size, device=logits_RV.device)
        per_tile = _TILE // size
        tiles = triton.cdiv(k, per_tile)
        with torch.cuda.device_of(logits_RV):
            _take[(r * tiles,)](
                logits_RV, blocks_RK.contiguous(), taken, logits_RV.stride(0), v, k, tiles,
                SIZE=size, PER_TILE=per_tile, num_warps=4,
            )  # fmt: skip
        return taken


def _shape(logits_RV: Tensor) -> tuple[int, int]:
    if logits_RV.stride(1) != 1:
        raise ValueError(f"the logits of a row must be contiguous, their stride is {logits_RV.stride(1)}")
    return logits_RV.shape[0], logits_RV.shape[1]


# Numbers that differ from question to question are not compiled in: only dtype, alignment and SIZE make a new kernel.
@triton.jit(do_not_specialize=["columns", "blocks", "tiles", "temperatures"])
def _summarize(
    logits, maxima, sums, scales, stride, columns, blocks, tiles, temperatures,
    SIZE: tl.constexpr, PER_TILE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64)
    tile = program % tiles
    block_P = tile * PER_TILE + tl.arange(0, PER_TILE)
    column_PX = block_P[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    here = logits + row * stride + column_PX
    # A mask on every column would keep the loads of a tile from being vectors; only the last tile needs it.
    if (tile + 1) * PER_TILE * SIZE <= columns:
        l_PX = tl.load(here).to(tl.float32)
    else:
        l_PX = tl.load(here, mask=column_PX < columns, other=-float("inf")).to(tl.float32)
    maximum_P = tl.max(l_PX, axis=1)
    shifted_PX = l_PX - tl.where(maximum_P == -float("inf"), 0.0, maximum_P)[:, None]
    inside = block_P < blocks
    tl.store(maxima + row * blocks + block_P, maximum_P, mask=inside)
    to = sums + row * temperatures * blocks + block_P
    tl.store(to, tl.log(tl.sum(tl.exp(shifted_PX), axis=1)), mask=inside)
    for i in range(1, temperatures):
        scale = tl.load(scales + i)
        tl.store(to + i * blocks, tl.log(tl.sum(tl.exp(shifted_PX * scale), axis=1)), mask=inside)


@triton.jit(do_not_specialize=["columns", "k", "tiles"])
def _take(logits, chosen, taken, stride, columns, k, tiles, SIZE: tl.constexpr, PER_TILE: tl.constexpr):
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64)
    place_P = (program % tiles) * PER_TILE + tl.arange(0, PER_TILE)
    inside = place_P < k
    block_P = tl.load(chosen + row * k + place_P, mask=inside, other=0)
    column_PX = block_P[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    wanted = (column_PX < columns) & inside[:, None]
    l_PX = tl.load(logits + row * stride + column_PX, mask=wanted, other=-float("inf")).to(tl.float32)
    to = taken + row * k * SIZE + place_P[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(to, l_PX, mask=inside[:, None])
