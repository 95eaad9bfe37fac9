"""From hidden states to the fields of a score, inside a worker of vLLM: with the LM head's weight where it can be.

vLLM's own logits have the model's dtype, and bfloat16 rounds a logit of 20 to steps of 1/8. A product with float32
results costs the same; whether it says what the model says is tried on states of usual and of large size. Where the
vocabulary is split over several GPUs, each reads its own shard and one all_gather of a few numbers a row joins them.
Legend: R rows, H hidden width, V real vocabulary, S shards, W packed numbers of a row.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from protos.scores import Field, ScoreSpec
from teacher_server.backends import readout_check
from teacher_server.backends.readout import HeadFn, Rows, float_head, read_chunk
from teacher_server.backends.readout_blocks import Kernels, Plan, merge, read_shard

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class LmHead:
    """`direct` turns states [R,H] into float32 logits of the ids from `first_id` on; `plain` is the model's own way.

    `direct` and `weight` [shard's V,H] are None where logits are not simply their product. `group` joins the shards of
    tensor parallelism.
    """

    plain: HeadFn
    direct: HeadFn | None
    weight: Tensor | None
    bias: Tensor | None
    first_id: int
    vocab_size: int
    kernels: Kernels
    group: Any

    @staticmethod
    def of(model: Any, vocab_size: int, device: torch.device, group: Any) -> LmHead:
        """The head of a model on this worker; every worker of `group` decides alike."""
        kernels = readout_check.choose(device, vocab_size)
        head, plain = _find(model), _plain(model, vocab_size)
        weight = getattr(head, "weight", None)
        first, last = 0, vocab_size
        if group.world_size > 1 and head is not None:
            held = head.shard_indices
            first, last = int(held.org_vocab_start_index), min(vocab_size, int(held.org_vocab_end_index))
        direct, bias = None, getattr(head, "bias", None)
        if isinstance(weight, Tensor) and weight.ndim == 2 and weight.is_floating_point():
            direct = _direct(weight, bias, max(0, last - first))
        if not _all(group, direct is not None and _agree(direct, plain, weight, slice(first, last)), device):
            _LOG.warning("the LM head is quantised or the model changes its logits: scores come from the engine's own")
            return LmHead(plain, None, None, None, 0, vocab_size, kernels, group)
        assert weight is not None
        return LmHead(plain, direct, weight[: max(0, last - first)], bias, first, vocab_size, kernels, group)

    def read(
        self, states_RH: Tensor, rows: Rows, spec: ScoreSpec, fields: frozenset[Field], *, plain: bool
    ) -> dict[str, Tensor]:
        """The wanted fields of R rows by name; `plain` reads the model's own logits by the formulas as they stand."""
        if plain:
            return readout_check.reference(self.plain(states_RH).float(), rows, spec, fields)
        if self.direct is None:
            return read_chunk(self.plain(states_RH), rows, spec, fields, self.kernels)
        logits = self.direct(states_RH)
        if self.group.world_size == 1:
            return read_chunk(logits, rows, spec, fields, self.kernels)
        candidates = 0 if rows.candidates is None else int(rows.candidates.shape[1])
        packed_RW = read_shard(logits, rows, Plan.of(spec, fields, candidates), self.kernels, self.first_id)
        packed_SRW = self.group.all_gather(packed_RW, dim=0).unflatten(0, (self.group.world_size, -1))
        return merge(packed_SRW, spec, fields, candidates)

    def rows(self, first: int, last: int) -> tuple[int, bytes, bytes] | None:
        """(first id, bytes of the weight, of the bias) of the rows first..last-1 held here; None without a weight."""
        if self.weight is None:
            return None
        begin = max(first, self.first_id)
        held = slice(begin - self.first_id, max(begin, last) - self.first_id)
        bias = b"" if self.bias is None else self.bias[held].float().cpu().numpy().tobytes()
        return begin, self.weight[held].contiguous().cpu().view(torch.uint8).numpy().tobytes(), bias


def _find(model: Any) -> Any:
    for holder in (model, getattr(model, "language_model", None)):
        head = getattr(holder, "lm_head", None)
        if head is not None:
            return head
    return None


def _plain(model: Any, vocab_size: int) -> HeadFn:
    def plain(states: Tensor) -> Tensor:
        logits: Tensor = model.compute_logits(states)
        return logits[:, :vocab_size]

    return plain


def _direct(weight: Tensor, bias: Tensor | None, rows: int) -> HeadFn:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    if rows == 0:
        return lambda states: states.new_empty((states.shape[0], 0), dtype=torch.float32)
    return float_head(linear, rows)


def _all(group: Any, flag: bool, device: torch.device) -> bool:
    """Whether the flag is up on every worker of the group."""
    if group.world_size == 1:
        return flag
    return bool(group.all_gather(torch.tensor([flag], dtype=torch.int32, device=device), dim=0).all())


@torch.inference_mode()
def _agree(direct: HeadFn | None, plain: HeadFn, weight: Any, held: slice) -> bool:
    """Whether both ways give the same logits, up to the rounding of the weight's dtype."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(4, weight.shape[1], generator=generator)
    agree = True
    for size in (1.0, 30.0):  # caps on logits show where they are large
        rows = (states * size).to(device=weight.device, dtype=weight.dtype)
        theirs = plain(rows).float()  # every worker of a group must take part
        if direct is None or held.start >= held.stop:
            continue
        apart = float((direct(rows) - theirs[:, held]).abs().max())
        agree = agree and apart <= 8 * torch.finfo(weight.dtype).eps * float(theirs.abs().max())
    return agree
