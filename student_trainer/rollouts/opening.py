"""Chooses the engine that a configuration asks for. Each engine's own library is imported when it starts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from ..config import Config
from ..errors import UserError
from .base import RolloutEngine
from .continuous import ContinuousEngine
from .padded import PaddedEngine
from .vllm_engine import VllmEngine

log = logging.getLogger(__name__)

KEY = "policy_distillation.rollout_engine"


def open_engine(config: Config, model: Any, *, vocab_size: int, eos_ids: Sequence[int], pad_id: int) -> RolloutEngine:
    """The engine that samples from `model`; UserError where it cannot do what is asked for."""
    options = config.policy_distillation
    wanted = options.rollout_engine
    if wanted == "vllm":
        if find_spec("vllm") is None:
            raise UserError(
                "vLLM is not installed here", KEY, "run: pip install 'strong2weak[vllm]', or use continuous"
            )
        return VllmEngine(
            model,
            vocab_size=vocab_size,
            eos_ids=eos_ids,
            slots=max(options.rollout_slots, config.evaluation.batch_size),
            max_length=config.data.max_length,
            engine_args=options.rollout_engine_args,
        )
    suits = ContinuousEngine.suits(model)
    if wanted == "continuous" and not suits:
        what = f"{type(model).__name__} has layers that do not attend over the whole past"
        raise UserError(f"{what}, whose slots cannot be refilled", KEY, "use padded, or vllm")
    if wanted == "auto" and not suits:
        log.info("this student's slots cannot be refilled, its completions are sampled in padded batches")
    kind = PaddedEngine if wanted == "padded" or not suits else ContinuousEngine
    return kind(model, vocab_size=vocab_size, eos_ids=eos_ids, pad_id=pad_id, slots=options.rollout_slots)
