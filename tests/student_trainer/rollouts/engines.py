"""A student that is made in a moment, and the engines that every claim about rollouts is tested with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from protos.scores import Floats, Ids
from student_trainer.rollouts import Rollout, RolloutEngine
from tests.tiny_qwen3 import make

VOCAB_SIZE = 261
"""Real tokens; the student's logits are 320 wide."""
EOS_IDS = (256, 10)
"""An end that the model knows as one, and one that it does not."""
SLOTS = 4
ENGINES = ("continuous", "padded", "vllm")


def make_student(folder: Path) -> Any:
    """A random Qwen3 with tied embeddings, in float32."""
    return AutoModelForCausalLM.from_pretrained(make(folder), dtype=torch.float32)


def open_one(name: str, model: Any, *, vocab_size: int = VOCAB_SIZE, eos_ids: tuple[int, ...] = EOS_IDS) -> Any:
    """The engine of that name over `model`."""
    same: dict[str, Any] = {"vocab_size": vocab_size, "eos_ids": eos_ids, "slots": SLOTS}
    if name == "vllm":
        from student_trainer.rollouts.vllm_engine import VllmEngine

        return VllmEngine(model, max_length=256, engine_args={"enforce_eager": True}, **same | {"slots": 64})
    from student_trainer.rollouts.continuous import ContinuousEngine
    from student_trainer.rollouts.padded import PaddedEngine

    kinds = {"continuous": ContinuousEngine, "padded": PaddedEngine}
    return kinds[name](model, pad_id=260, **same)


def prompts(count: int, seed: int = 0) -> list[Ids]:
    """`count` random prompts of 1 to 24 tokens."""
    numbers = np.random.default_rng(seed)
    return [numbers.integers(0, 256, numbers.integers(1, 25)).astype(np.int32) for _ in range(count)]


def recomputed(model: Any, rollout: Rollout, temperature: float, vocab_size: int = VOCAB_SIZE) -> Floats:
    """float32[R] of `model`'s own log-probabilities of the completion, in one pass without a cache."""
    ids = torch.from_numpy(np.concatenate([rollout.prompt_ids, rollout.completion_ids]).astype(np.int64))
    ids = ids.to(model.device)
    start = len(rollout.prompt_ids)
    with torch.no_grad():
        logits = model(ids[None]).logits[0, start - 1 : -1, :vocab_size].float()
    found: Floats = (logits / temperature).log_softmax(-1).gather(1, ids[start:, None])[:, 0].cpu().numpy()
    return found


def tokens(rollouts: list[Rollout]) -> list[list[int]]:
    """The completions, comparable."""
    return [r.completion_ids.tolist() for r in rollouts]


def closed(engine: RolloutEngine) -> None:
    """Closes an engine twice, which is allowed."""
    engine.close()
    engine.close()
