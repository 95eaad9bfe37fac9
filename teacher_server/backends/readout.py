"""From final hidden states to scores, a bounded number of rows at a time.

Never holds [tokens, vocabulary]: the LM head runs on a chunk of rows, and all that is kept of a chunk are the fields
that were asked for. Knows no queue and no forward pass. Legend: R rows, H hidden width, V real vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from protos.scores import TAIL_FLOOR, Field, Scores, ScoreSpec

HeadFn = Callable[[Tensor], Tensor]
"""Rows [R, W] of the model's last features -> float32 logits [R, V] over the real vocabulary."""


@dataclass(frozen=True, eq=False)
class Rows:
    """What is asked about R rows: `targets` int64[R] and `candidates` int64[R, C] or None, both on the CPU."""

    targets: Tensor
    candidates: Tensor | None


def float_head(head: nn.Module, vocab_size: int, slice_bytes: int = 2**26) -> HeadFn:
    """An LM head whose products are accumulated and returned in float32, over the first `vocab_size` rows.

    A half-precision head would round logits to 3 digits and with them every tail. On a GPU one matrix product returns
    float32 from half-precision factors; elsewhere slices of the weight are widened in turn, `slice_bytes` each.
    """
    weight = getattr(head, "weight", None)
    if type(head) is not nn.Linear or not isinstance(weight, Tensor):
        return lambda rows: head(rows)[..., :vocab_size].float()
    bias = None if head.bias is None else head.bias[:vocab_size].float()
    w_VH = weight[:vocab_size]
    if w_VH.dtype == torch.float32:
        return lambda rows: nn.functional.linear(rows.float(), w_VH, bias)
    if w_VH.is_cuda:

        def on_gpu(rows: Tensor) -> Tensor:
            logits = torch.mm(rows.to(w_VH.dtype), w_VH.t(), out_dtype=torch.float32)
            return logits if bias is None else logits.add_(bias)

        return on_gpu
    step = max(1, slice_bytes // (4 * w_VH.shape[1]))

    def in_slices(rows: Tensor) -> Tensor:
        wide = rows.float()
        logits = torch.empty(wide.shape[0], vocab_size)
        for first in range(0, vocab_size, step):
            logits[:, first : first + step] = wide @ w_VH[first : first + step].float().t()
        return logits if bias is None else logits.add_(bias)

    return in_slices


def chunk_rows(vocab_size: int, device: torch.device) -> int:
    """Rows of one chunk: 64 MiB of float32 logits on a CPU, 512 MiB on a GPU."""
    return max(1, (2**29 if device.type == "cuda" else 2**26) // (4 * vocab_size))


def read_chunk(logits_RV: Tensor, rows: Rows, spec: ScoreSpec, fields: frozenset[Field]) -> dict[str, Tensor]:
    """The wanted fields of R rows by name, and `finite` bool[R]; overwrites `logits_RV` (float32).

    The tail at temperature T is the logsumexp of l/T over the complement of the top K, less C_T; C_1 = 0.
    """
    device = logits_RV.device
    lse_R1 = torch.logsumexp(logits_RV, dim=-1, keepdim=True)
    out: dict[str, Tensor] = {"finite": torch.isfinite(lse_R1[:, 0])}
    l_RV = logits_RV.sub_(lse_R1)
    if Field.TOKEN_LOGPROBS in fields:
        out["token_logprobs"] = l_RV.gather(1, rows.targets.to(device)[:, None])[:, 0]
    if Field.CANDIDATE_LOGPROBS in fields and rows.candidates is not None:
        out["candidate_logprobs"] = l_RV.gather(1, rows.candidates.to(device))
    top_ids = None
    if spec.top_k and fields & {Field.TOP, Field.TAIL_LOGPROB}:
        top, top_ids = torch.topk(l_RV, spec.top_k, dim=-1)
        if Field.TOP in fields:
            out["top_logprobs"], out["top_token_ids"] = top, top_ids
    if fields & {Field.LOG_NORMALIZER, Field.TAIL_LOGPROB}:
        normalizers = [_normalizer(l_RV, t) for t in spec.temperatures]
        if Field.LOG_NORMALIZER in fields:
            out["log_normalizer"] = torch.stack(normalizers, dim=1)
        if Field.TAIL_LOGPROB in fields and top_ids is not None:
            l_RV.scatter_(1, top_ids, -math.inf)
            tails = [_lse(l_RV, t) - c_R for t, c_R in zip(spec.temperatures, normalizers, strict=True)]
            out["tail_logprob"] = torch.stack(tails, dim=1).clamp_(min=TAIL_FLOOR)
    return out


def _lse(l_RV: Tensor, temperature: float) -> Tensor:
    return torch.logsumexp(l_RV if temperature == 1 else l_RV / temperature, dim=-1)


def _normalizer(l_RV: Tensor, temperature: float) -> Tensor:
    return l_RV.new_zeros(l_RV.shape[0]) if temperature == 1 else _lse(l_RV, temperature)


def assemble(parts: list[dict[str, np.ndarray[Any, Any]]]) -> Scores | None:
    """Consecutive parts of one sequence's rows as a score of its own memory; None where a number is not finite."""
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if not joined.pop("finite").all():
        return None
    kinds: dict[str, Any] = {"top_token_ids": np.int32}
    arrays: dict[str, Any] = {name: array.astype(kinds.get(name, np.float32)) for name, array in joined.items()}
    scores = Scores(**arrays)
    return scores if scores.finite() else None
