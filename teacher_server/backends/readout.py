"""From final hidden states to scores, a bounded number of rows at a time.

Never holds [tokens, vocabulary]: the LM head runs on a chunk of rows, and all that is kept of a chunk are the fields
that were asked for. Knows no queue and no forward pass. Legend: R rows, H hidden width, V real vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from protos.scores import Field, Scores, ScoreSpec
from teacher_server.backends.readout_blocks import TORCH, Kernels, Plan, Rows, merge, read_shard

__all__ = ["HeadFn", "Rows", "assemble", "chunk_rows", "float_head", "read_chunk"]

HeadFn = Callable[[Tensor], Tensor]
"""Rows [R, W] of the model's last features -> float32 logits [R, V] over the real vocabulary."""


def float_head(head: nn.Module, vocab_size: int, slice_bytes: int = 2**26) -> HeadFn:
    """An LM head whose products are accumulated and returned in float32, over the first `vocab_size` rows.

    A half-precision head would round logits to 3 digits and with them every tail. On a GPU one matrix product returns
    float32 from half-precision factors; elsewhere slices of the weight are widened in turn, `slice_bytes` each.
    """
    weight = getattr(head, "weight", None)
    if type(head) is not nn.Linear or not isinstance(weight, Tensor):
        return lambda rows: head(rows)[..., :vocab_size].float()
    if weight.is_cuda:
        return _on_gpu(weight, head.bias, vocab_size)
    bias = None if head.bias is None else head.bias[:vocab_size].float()
    w_VH = weight[:vocab_size]
    if w_VH.dtype == torch.float32:
        return lambda rows: nn.functional.linear(rows.float(), w_VH, bias)
    step = max(1, slice_bytes // (4 * w_VH.shape[1]))

    def in_slices(rows: Tensor) -> Tensor:
        wide = rows.float()
        logits = torch.empty(wide.shape[0], vocab_size)
        for first in range(0, vocab_size, step):
            logits[:, first : first + step] = wide @ w_VH[first : first + step].float().t()
        return logits if bias is None else logits.add_(bias)

    return in_slices


def _on_gpu(weight: Tensor, bias: Tensor | None, vocab_size: int) -> HeadFn:
    """The whole padded weight, cut afterwards: 151,669 rows are not aligned and take 6 times as long as 151,936."""

    def head(rows: Tensor) -> Tensor:
        rows = rows.to(weight)  # the last layer may be on another GPU
        if weight.dtype == torch.float32:
            logits = rows @ weight.t()
        else:
            logits = torch.mm(rows, weight.t(), out_dtype=torch.float32)
        return (logits if bias is None else logits.add_(bias))[:, :vocab_size]

    return head


def chunk_rows(vocab_size: int, device: torch.device) -> int:
    """Rows of one chunk: 64 MiB of float32 logits on a CPU, a 32nd of a GPU's memory, at most 1.25 GiB.

    On a GPU a multiple of 256, the rows of a tile of the head's product: 2048 for Qwen3's vocabulary where memory is
    40 GiB or more. Fewer rows fill the GPU less and read the head's weight more often for each row.
    """
    if device.type != "cuda":
        return max(1, 2**26 // (4 * vocab_size))
    memory = torch.cuda.get_device_properties(device).total_memory
    rows = min(4096, min(memory // 32, 5 * 2**28) // (4 * vocab_size))
    return int(rows // 256 * 256 or max(1, rows))


def read_chunk(
    logits_RV: Tensor,
    rows: Rows,
    spec: ScoreSpec,
    fields: frozenset[Field],
    kernels: Kernels = TORCH,
) -> dict[str, Tensor]:
    """The wanted fields of R rows by name, and `finite` bool[R]; may overwrite `logits_RV` (any float dtype).

    Formulas are those of `readout_blocks.merge`; `kernels` are what `readout_check.choose` found for the device.
    """
    candidates = 0 if rows.candidates is None else int(rows.candidates.shape[1])
    packed_RW = read_shard(logits_RV, rows, Plan.of(spec, fields, candidates), kernels)
    return merge(packed_RW[None], spec, fields, candidates)


def assemble(parts: list[dict[str, np.ndarray[Any, Any]]]) -> Scores | None:
    """Consecutive parts of one sequence's rows as a score of its own memory; None where a number is not finite."""
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if not joined.pop("finite").all():
        return None
    kinds: dict[str, Any] = {"top_token_ids": np.int32}
    arrays: dict[str, Any] = {
        name: array if name == "hidden_states" else array.astype(kinds.get(name, np.float32))
        for name, array in joined.items()
    }
    scores = Scores(**arrays)
    return scores if scores.finite() else None
