"""The LM head of a model inside vLLM: float32 logits without rounding where the head is a plain matrix.

vLLM's own logits have the model's dtype, and bfloat16 rounds a logit of 20 to steps of 1/8. A direct product with
float32 results costs the same; whether it says what the model says is tried on rows of random and of large states.
Legend: R rows, H hidden width, V real vocabulary.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from teacher_server.backends.readout import HeadFn, float_head

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class LmHead:
    """`logits` and `plain` turn states [R,H] into logits [R, V or more]; `plain` is the model's own way.

    `kind` is "direct" where `logits` multiplies with the weight itself. `first_row` is the vocabulary's first id here.
    """

    kind: str
    logits: HeadFn
    plain: HeadFn
    hidden_size: int
    dtype: torch.dtype
    weight: Tensor | None = None
    first_row: int = 0

    @staticmethod
    def choose(model: Any, vocab_size: int, device: torch.device, hidden_size: int, dtype: torch.dtype) -> LmHead:
        """The direct way where it agrees with the model's, else the model's."""

        def plain(states: Tensor) -> Tensor:
            logits: Tensor = model.compute_logits(states)
            return logits

        head = _find(model)
        weight = getattr(head, "weight", None)
        reason = ""
        if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
            reason = "the LM head is quantised"
        elif getattr(head, "tp_size", 1) > 1:
            reason = "the LM head is split over several GPUs"
        if reason or weight is None:
            _LOG.warning("%s: scores are made from the engine's own logits, in %s", reason or "no LM head", dtype)
            return LmHead("engine", plain, plain, hidden_size, dtype)
        linear = nn.Linear(
            weight.shape[1], weight.shape[0], bias=getattr(head, "bias", None) is not None, device="meta"
        )
        linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
        if linear.bias is not None:
            linear.bias = nn.Parameter(head.bias.detach(), requires_grad=False)
        direct = float_head(linear, vocab_size)
        if not _agree(direct, plain, weight, vocab_size, device):
            _LOG.warning(
                "the model changes its logits after the LM head: scores are made from its own, in %s", weight.dtype
            )
            return LmHead("engine", plain, plain, weight.shape[1], weight.dtype)
        return LmHead("direct", direct, plain, weight.shape[1], weight.dtype, weight[:vocab_size])

    def rows(self, first: int, last: int) -> tuple[int, bytes] | None:
        """(first row, bytes) of the rows first..last-1 that this worker holds."""
        if self.weight is None:
            return None
        first = max(first, self.first_row)
        part = self.weight[first - self.first_row : max(first, last) - self.first_row]
        return first, part.contiguous().cpu().view(torch.uint8).numpy().tobytes()


def _find(model: Any) -> Any:
    for holder in (model, getattr(model, "language_model", None)):
        head = getattr(holder, "lm_head", None)
        if head is not None:
            return head
    return None


@torch.inference_mode()
def _agree(direct: HeadFn, plain: HeadFn, weight: Tensor, vocab_size: int, device: torch.device) -> bool:
    """Whether both give the same logits for states of usual and of large size, up to the rounding of their dtype."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(4, weight.shape[1], generator=generator)
    for size in (1.0, 30.0):  # caps on logits show where they are large
        rows = (states * size).to(device=device, dtype=weight.dtype)
        ours, theirs = direct(rows)[:, :vocab_size].float(), plain(rows)[:, :vocab_size].float()
        if float((ours - theirs).abs().max()) > 8 * torch.finfo(weight.dtype).eps * float(theirs.abs().max()):
            return False
    return True
