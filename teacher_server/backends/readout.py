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
    """Rows of one chunk: 64 MiB of float32 logits on a CPU, 512 MiB on a GPU."""
    return max(1, (2**29 if device.type == "cuda" else 2**26) // (4 * vocab_size))


def read_chunk(logits_RV: Tensor, rows: Rows, spec: ScoreSpec, fields: frozenset[Field]) -> dict[str, Tensor]:
    """The wanted fields of R rows by name, and `finite` bool[R]; overwrites `logits_RV` (float32).

    With Z_T = logsumexp(logits / T): l = logits - Z_1, C_T = Z_T - Z_1 / T (0 at T = 1), and the tail at T is the
    logsumexp of logits / T over the complement of the top K, less Z_T.
    """
    device = logits_RV.device
    z1_R1 = torch.logsumexp(logits_RV, dim=-1, keepdim=True)
    out: dict[str, Tensor] = {"finite": torch.isfinite(z1_R1[:, 0])}
    if Field.TOKEN_LOGPROBS in fields:
        out["token_logprobs"] = (logits_RV.gather(1, rows.targets.to(device)[:, None]) - z1_R1)[:, 0]
    if Field.CANDIDATE_LOGPROBS in fields and rows.candidates is not None:
        out["candidate_logprobs"] = logits_RV.gather(1, rows.candidates.to(device)) - z1_R1
    top_ids = None
    if spec.top_k and fields & {Field.TOP, Field.TAIL_LOGPROB}:
        top, top_ids = torch.topk(logits_RV, spec.top_k, dim=-1)
        if Field.TOP in fields:
            out["top_logprobs"], out["top_token_ids"] = top - z1_R1, top_ids
    if fields & {Field.LOG_NORMALIZER, Field.TAIL_LOGPROB}:
        z_RM = torch.stack([z1_R1[:, 0] if t == 1 else _lse(logits_RV, t) for t in spec.temperatures], dim=1)
        if Field.LOG_NORMALIZER in fields:
            inverse_M = torch.tensor([1 / t for t in spec.temperatures], device=device)
            out["log_normalizer"] = z_RM - z1_R1 * inverse_M
        if Field.TAIL_LOGPROB in fields and top_ids is not None:
            logits_RV.scatter_(1, top_ids, -math.inf)
            tails_RM = torch.stack([_lse(logits_RV, t) for t in spec.temperatures], dim=1)
            out["tail_logprob"] = (tails_RM - z_RM).clamp_(min=TAIL_FLOOR)
    return out


def _lse(logits_RV: Tensor, temperature: float) -> Tensor:
    return torch.logsumexp(logits_RV if temperature == 1 else logits_RV / temperature, dim=-1)


def assemble(parts: list[dict[str, np.ndarray[Any, Any]]]) -> Scores | None:
    """Consecutive parts of one sequence's rows as a score of its own memory; None where a number is not finite."""
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if not joined.pop("finite").all():
        return None
    kinds: dict[str, Any] = {"top_token_ids": np.int32}
    arrays: dict[str, Any] = {name: array.astype(kinds.get(name, np.float32)) for name, array in joined.items()}
    scores = Scores(**arrays)
    return scores if scores.finite() else None
