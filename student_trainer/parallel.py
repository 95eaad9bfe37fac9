"""How the processes of a run share its training: replicas of the student (DDP), or shards of its weights, gradients and
optimizer states (FSDP2, DeepSpeed ZeRO-3).

From `training.parallel`, or what `accelerate launch` put into the environment, to arguments of the Trainer. Knows no
model; sharding.py does the sharding.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from . import distributed
from .config import Models, Training
from .errors import UserError

log = logging.getLogger(__name__)

Way = Literal["ddp", "fsdp", "deepspeed"]

_BY_ACCELERATE: dict[str, Way] = {"ACCELERATE_USE_FSDP": "fsdp", "ACCELERATE_USE_DEEPSPEED": "deepspeed"}

ZERO_3: dict[str, Any] = {
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "bf16": {"enabled": "auto"},
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "zero_allow_untested_optimizer": True,
    "steps_per_print": 1_000_000_000,
    "wall_clock_breakdown": False,
}
"""The DeepSpeed configuration where training.deepspeed_config names none; "auto" is filled in by transformers."""


def launched(environment: MutableMapping[str, str] = os.environ) -> Way | None:
    """What `accelerate launch` asks for, or None where it was not it, or asks for nothing special."""
    return next((way for name, way in _BY_ACCELERATE.items() if environment.get(name, "").lower() == "true"), None)


def prepare_environment(environment: MutableMapping[str, str] = os.environ) -> None:
    """Takes back two settings of `accelerate launch`: each process loads the whole student, because it is measured and
    samples before and between its training; and ZeRO-3 gathers weights when it saves, because checkpoints are whole.
    """
    way = launched(environment)
    if way == "fsdp":
        environment["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    elif way == "deepspeed":
        environment["ACCELERATE_DEEPSPEED_ZERO3_INIT"] = "false"
        environment["ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"] = "true"


@contextmanager
def no_traces() -> Iterator[None]:
    """Takes back what accelerate and transformers note for the whole process while they train: else the next stage
    would look like one that `accelerate launch` configured, and its student be loaded in shards.
    """
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    before = set(os.environ)
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        for name in set(os.environ) - before:
            if name.startswith(("ACCELERATE_", "FSDP_")):
                del os.environ[name]


def chosen(training: Training) -> Way:
    """The way of this run; UserError where configuration and launcher disagree."""
    by_launcher = launched()
    if training.parallel is not None and by_launcher not in (None, training.parallel):
        raise UserError(
            f"{training.parallel!r} is configured, accelerate launch says {by_launcher!r}",
            "training.parallel",
            "set it to null, which takes the launcher's, or change accelerate's configuration",
        )
    way = training.parallel or by_launcher or "ddp"
    if way != "ddp" and distributed.world() == 1:
        log.info("training.parallel %s needs several processes, this is one: nothing is sharded", way)
        return "ddp"
    return way


def checkpoints_itself(way: Way) -> bool:
    """Whether activations are recomputed by FSDP, which then does not gather a layer's weights once more for it."""
    return way == "fsdp" and launched() != "fsdp"


def arguments(training: Training, models: Models, way: Way) -> dict[str, Any]:
    """Arguments of the Trainer for `way`.

    UserError where DeepSpeed is not installed, or its configuration cannot be used, or the student is quantised, whose
    weights nobody can shard.
    """
    if way == "ddp":
        return {"ddp_find_unused_parameters": False}
    if models.student_load_in_4bit or models.student_load_in_8bit:
        step = "use ddp, where a quantised student has room on one device, or train without quantisation"
        raise UserError(f"{way} cannot shard a quantised student", "training.parallel", step)
    if way == "fsdp":
        if launched() == "fsdp":
            return {}
        settings = {"version": 2, "activation_checkpointing": training.gradient_checkpointing}
        return {"fsdp": True, "fsdp_config": settings}
    if find_spec("deepspeed") is None:
        step = "pip install 'strong2weak[deepspeed]', or use fsdp"
        raise UserError("DeepSpeed is not installed", "training.parallel", step)
    # DeepSpeed keeps bfloat16 weights beside float32 ones, if it is told that they are bfloat16.
    bf16 = {"bf16": True} if models.torch_dtype == "bfloat16" else {}
    if launched() == "deepspeed":
        return bf16
    return {"deepspeed": _deepspeed(training.deepspeed_config), **bf16}


def _deepspeed(path: str | None) -> dict[str, Any]:
    if path is None:
        return json.loads(json.dumps(ZERO_3))  # type: ignore[no-any-return] # transformers fills it in
    try:
        settings: dict[str, Any] = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
        zero = settings.get("zero_optimization", {})
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"cannot be read: {error}", "training.deepspeed_config", "name a JSON file") from error
    if zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        step = "set zero_optimization.stage3_gather_16bit_weights_on_model_save to true"
        raise UserError("checkpoints would hold no weights", "training.deepspeed_config", step)
    return settings
