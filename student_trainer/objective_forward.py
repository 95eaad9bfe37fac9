"""Lets a causal language model compute a loss inside its own forward, where the hooks of DDP and FSDP see it.

Knows how transformers lays out such a model (a body and an output head), and no loss, teacher or batch.
"""

from __future__ import annotations

import functools
import types
from typing import Any

from .errors import UserError


def causal_model(model: Any) -> Any:
    """The language model itself, inside whatever wraps it: processes, adapters."""
    while hasattr(model, "module"):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def accept_objective(model: Any) -> Any:
    """Lets `model` compute a loss inside its own forward: forward(input_ids=..., places=..., objective=...).

    Then the body alone runs, and the result is objective(hidden [N,H], head) with the hidden states at the flat
    positions `places` int64[N] of [B*L] and the LM head module: logits of the whole batch never exist. Because this
    happens inside forward, and the objective inside the head's own, the hooks of DDP, FSDP and ZeRO run as in any
    training, and a head whose weight lies in shards is whole there. Without `objective`, forward is what it was.
    Returns `model`.
    """
    causal = causal_model(model)
    for scaled in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(causal.config, scaled, None) not in (None, 1, 1.0):
            raise UserError(
                f"{type(causal).__name__} changes its logits after the head ({scaled}), which is unsupported"
            )
    plain = causal.forward.__func__

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, objective: Any = None, places: Any = None, **kwargs: Any) -> Any:
        if objective is None:
            return plain(self, *args, **kwargs)
        kwargs = {name: value for name, value in kwargs.items() if value is not None}  # PEFT names what nobody gave
        hidden = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state
        return self.get_output_embeddings()(hidden.flatten(0, 1).index_select(0, places), objective)

    causal.forward = types.MethodType(forward, causal)
    _accept_in_head(causal.get_output_embeddings())
    return model


def _accept_in_head(head: Any) -> None:
    """Lets head(hidden, objective) be objective(hidden, head), inside the head's forward."""
    plain = head.forward.__func__

    @functools.wraps(plain)
    def forward(self: Any, hidden: Any, objective: Any = None) -> Any:
        return plain(self, hidden) if objective is None else objective(hidden, self)

    head.forward = types.MethodType(forward, head)
