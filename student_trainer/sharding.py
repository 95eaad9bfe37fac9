"""Weights in shards: how the Trainer comes to shard a student, and how a sharded student is whole for a while.

FSDP2 and DeepSpeed ZeRO-3 keep a part of each weight on each process and gather a layer when it runs. A backward pass
needs that; sampling and measuring do not, where every layer would be gathered again for each token and all processes
had to make the same number of passes. `whole` gathers once, and inside it every process does work of its own. Knows
no loss, data or configuration.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from .errors import UserError
from .objective_forward import causal_model

_ENGINE = "_zero_engine"


@contextmanager
def whole(model: Any) -> Iterator[None]:
    """All weights of `model` are on this process while it lasts, for forward passes without gradient.

    All processes must begin and end it together; in between they need not keep step. Nothing where `model` is not
    sharded.
    """
    engine = getattr(causal_model(model), _ENGINE, None)
    if engine is not None and engine.zero_optimization_partition_weights():
        from deepspeed.runtime.zero.stage3 import unwrap_model_for_generation

        with unwrap_model_for_generation(engine):
            yield
        return
    with _unsharded(model):
        yield


@contextmanager
def _unsharded(model: Any) -> Iterator[None]:
    """FSDP2: gathers every group of weights and keeps it after each forward pass."""
    from torch.distributed.fsdp import FSDPModule

    modules = [m for m in model.modules() if isinstance(m, FSDPModule)]
    groups = {id(g): g for m in modules for g in _groups(m._get_fsdp_state())}
    # The public switch cannot be read, so its value could not be put back.
    after_forward = [(g, g.post_forward_mesh_info) for g in groups.values()]
    for group, _ in after_forward:
        group.post_forward_mesh_info = None
    try:
        for module in modules:
            module.unshard()
        yield
    finally:
        for group, mesh_info in after_forward:
            group.post_forward_mesh_info = mesh_info
        for module in modules:
            module.reshard()


def _groups(state: Any) -> list[Any]:
    """A module's groups of weights: torch 2.11 has one or none, later ones a list."""
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    one = state._fsdp_param_group
    return [] if one is None else [one]


@contextmanager
def loading_alone() -> Iterator[None]:
    """One process may load a model while ZeRO-3 trains another: else transformers would load it in shards, and wait
    for the other processes.
    """
    from transformers.integrations import deepspeed

    noted = deepspeed._hf_deepspeed_config_weak_ref
    config = noted() if noted is not None else None
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            deepspeed.set_hf_deepspeed_config(config)


class _RememberEngine(TrainerCallback):  # type: ignore[misc]
    """Notes DeepSpeed's engine at the model that it trains, where `whole` finds it."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The engine is there from here on."""
        object.__setattr__(causal_model(self.trainer.model), _ENGINE, self.trainer.model_wrapped)


class ShardingTrainer(Trainer):  # type: ignore[misc]
    """A Trainer that shards as its arguments or `accelerate launch` say, on a CPU too."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if self.is_deepspeed_enabled:
            self.add_callback(_RememberEngine(self))

    def create_accelerator_and_postprocess(self) -> None:
        """Adds what accelerate leaves out: FSDP2 without a GPU, and gradients that are summed in float32."""
        super().create_accelerator_and_postprocess()
        state, wanted = self.accelerator.state, self.args.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true"
        if wanted and str(state.distributed_type).endswith("MULTI_CPU"):
            self._shard_on_cpu(state)
        plugin = getattr(state, "fsdp_plugin", None)
        if plugin is None:
            return
        if plugin.fsdp_version != 2:
            raise UserError("FSDP 1 is not supported", "fsdp_version", "set fsdp_version: 2 in accelerate's config")
        if "FULL_STATE_DICT" not in str(plugin.state_dict_type):
            plugin.set_state_dict_type("FULL_STATE_DICT")  # a checkpoint is a whole model folder
        policy = plugin.mixed_precision_policy
        if policy is not None:
            # accelerate would sum gradients, and give back the loss, in the narrow type.
            plugin.mixed_precision_policy = type(policy)(param_dtype=policy.param_dtype, reduce_dtype=torch.float32)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Tied weights, which FSDP gathers once for each of their names, are one tensor again and written once."""
        tied = getattr(causal_model(self.model), "all_tied_weights_keys", None) or {}
        for name, same in tied.items():
            if state_dict and name in state_dict and same in state_dict:
                state_dict[name] = state_dict[same]
        super()._save(output_dir, state_dict)

    def _shard_on_cpu(self, state: Any) -> None:
        """accelerate takes FSDP for GPUs alone, although FSDP2 works over gloo."""
        from accelerate import PartialState
        from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

        plugin = FullyShardedDataParallelPlugin(**(self.args.fsdp_plugin_args or {}))
        if state.mixed_precision != "no":
            plugin.set_mixed_precision(state.mixed_precision)
        PartialState().distributed_type = state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = plugin
        self.is_fsdp_enabled = True
