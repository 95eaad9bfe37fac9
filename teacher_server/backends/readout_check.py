"""Which kernels the read-out may use on a device: those of Triton where they agree with the formulas, else PyTorch's.

Runs once when a backend starts. Knows no model. Legend: R rows, V real vocabulary.
"""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

from protos.scores import TAIL_FLOOR, Field, ScoreSpec
from teacher_server.backends.readout import read_chunk
from teacher_server.backends.readout_blocks import TORCH, Kernels, Rows

_LOG = logging.getLogger(__name__)
_CLOSE = 1e-3
"""Nats by which a float32 result may differ from the float64 formulas."""


@torch.inference_mode()
def choose(device: torch.device, vocab_size: int) -> Kernels:
    """Triton's kernels on a CUDA device where they compile and agree; otherwise PyTorch's, with a warning on CUDA.

    Compiles what the most common questions need, so that the first of them does not wait. Raises
    torch.AcceleratorError where the device itself is lost.
    """
    if device.type != "cuda":
        return TORCH
    try:
        from teacher_server.backends.readout_triton import TritonKernels

        kernels = TritonKernels()
        reason = disagreement(kernels, device, vocab_size)
    except torch.AcceleratorError:
        raise
    except Exception as error:  # noqa: BLE001 - a compiler has many ways to fail, and all of them have this answer
        reason = f"{type(error).__name__}: {error}"
    if not reason:
        return kernels
    _LOG.warning(
        "the Triton kernels of the read-out cannot be used (%s); PyTorch reads the logits about five times instead of "
        "once, about 1 us a row more at 151,936 ids on an H100, and needs as much memory again; install the Triton "
        "that belongs to this PyTorch, and a C compiler",
        reason,
    )
    return TORCH


def disagreement(kernels: Kernels, device: torch.device, vocab_size: int) -> str:
    """The first field that differs from `reference` in float64 on a few random rows, in words; "" for none."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([0.01, 1.0, 4.0, 12.0, 12.0])[:, None]
    width = -(-vocab_size // 64) * 64
    padded = torch.randn(5, width, generator=generator) * spread
    padded[4, : vocab_size // 2] = -math.inf
    for top_k in sorted({0, 1, min(8, vocab_size // 2), min(64, vocab_size // 2)}):
        for temperatures in ((1.0,), (1.0, 2.0, 0.5)):
            spec = ScoreSpec(top_k=top_k, temperatures=temperatures)
            candidates = torch.randint(vocab_size, (5, 8), generator=generator)
            candidates[4] = vocab_size - 1
            rows = Rows(candidates[:, 0], candidates)
            fields = spec.fields(candidates.shape[1])
            want = reference(padded[:, :vocab_size].double(), rows, spec, fields)
            got = read_chunk(padded.to(device, copy=True)[:, :vocab_size], rows, spec, fields, kernels)
            for name, expected in want.items():
                values = got[name].cpu()
                if name == "top_token_ids":  # ids of equal logits may come in any order
                    values = padded.gather(1, values.long()) - padded.gather(1, expected)
                    expected = torch.zeros_like(values)
                worst = float((values.double() - expected.double()).abs().max())
                if not worst <= _CLOSE:
                    return f"{name} differs by {worst:.2g} for top_k {top_k} and {len(temperatures)} temperature(s)"
    return ""


def reference(logits_RV: Tensor, rows: Rows, spec: ScoreSpec, fields: frozenset[Field]) -> dict[str, Tensor]:
    """The wanted fields of R rows by name, and `finite` bool[R]; overwrites `logits_RV`, of any dtype.

    The formulas as they stand, several passes over the logits for each.

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
            inverse_M = torch.tensor([1 / t for t in spec.temperatures], dtype=z_RM.dtype, device=device)
            out["log_normalizer"] = z_RM - z1_R1 * inverse_M
        if Field.TAIL_LOGPROB in fields and top_ids is not None:
            logits_RV.scatter_(1, top_ids, -math.inf)
            tails_RM = torch.stack([_lse(logits_RV, t) for t in spec.temperatures], dim=1)
            out["tail_logprob"] = (tails_RM - z_RM).clamp_(min=TAIL_FLOOR)
    return out


def _lse(logits_RV: Tensor, temperature: float) -> Tensor:
    return torch.logsumexp(logits_RV if temperature == 1 else logits_RV / temperature, dim=-1)
