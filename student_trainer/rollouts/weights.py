"""The student's weights as an engine beside it wants them: by the names of its checkpoint, adapters merged.

It knows peft's LoRA layers, no engine. A model in shards must be whole (see sharding.whole).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError


@torch.no_grad()
def full_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every weight, one at a time, so that there is never a second copy of the model.

    Tied weights come once, by the name of the input embedding. A layer with LoRA gives its weight, dequantised where it
    was quantised, plus its active adapters, as merging would, and is itself left as it is.
    """
    if not hasattr(model, "peft_config"):
        yield from ((name, parameter.detach()) for name, parameter in model.named_parameters())
        return
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, BaseTunerLayer)}
    for name, layer in layers.items():
        if not isinstance(layer, LoraLayer) or getattr(layer, "lora_variant", None) or not layer.lora_A:
            raise UserError(
                f"{name} has an adapter of kind {type(layer).__name__}, only plain LoRA on linear layers is merged",
                "policy_distillation.rollout_engine",
                "use continuous",
            )
        yield f"{name}.weight", _merged_weight(layer)
        bias = getattr(layer.get_base_layer(), "bias", None)
        if bias is not None:
            yield f"{name}.bias", bias.detach()
    inside = tuple(f"{name}." for name in layers)
    for name, parameter in model.get_base_model().named_parameters():
        if not name.startswith(inside):
            yield name, parameter.detach()


def _merged_weight(layer: Any) -> Tensor:
    from peft.utils.integrations import dequantize_module_weight

    weight: Tensor = dequantize_module_weight(layer.get_base_layer()).detach()
    if not layer.disable_adapters and not layer.merged:
        for adapter in (a for a in layer.active_adapters if a in layer.lora_A):
            weight = weight + layer.get_delta_weight(adapter)
    return weight
