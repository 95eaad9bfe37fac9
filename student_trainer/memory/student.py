"""What the student's node holds on each GPU: weights, gradients, optimiser states, activations, the loss, the rollouts'
keys and values, and at which moments of a run they are there together.

The formulas follow transformers' Qwen3 in PyTorch: what autograd keeps of a layer for the backward pass, AdamW's two
states, and the fused loss of `losses/`. docs/models.md derives them; benchmarks/memory.py holds them against a GPU.
Bytes, on one device. Legend: V vocabulary, H hidden size, Q and K widths of all query and all key heads, F of the MLP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from student_trainer.config import Config
from student_trainer.memory.shapes import Shape

ONCE_BYTES, BLOCK_BYTES, BLOCK_IDS = 2**29, 2**26, 2048
"""As in losses/fused.py: logits that are held at once, or a block of them where they are computed twice."""
PREFILL_TOKENS = 16384
"""As in rollouts/continuous.py: prompt tokens of one forward pass."""
NF4_BYTES, INT8_BYTES = 0.516, 1.01
"""Bytes of a weight in bitsandbytes' 4 bits (with double quantisation) and 8 bits."""


@dataclass(frozen=True)
class Setup:
    """What a stage's memory depends on, beside the model.

    `weight_bytes` are those of a weight (2: bfloat16 or float16, 4: float32), `frozen_bytes` those of a weight below
    adapters, `autocast` whether float32 weights compute in 16 bits. `sequences` of `length` tokens, `completion` of
    them scored, are one forward pass. `slots` completions are sampled at the same time, up to `sampled_length` tokens
    with their prompts; 0 samples nothing here. `teacher_hidden` is the width of a teacher whose head this device
    holds, or 0. `processes` share as `parallel` says.
    """

    weight_bytes: int = 2
    frozen_bytes: float = 2
    autocast: bool = False
    checkpointing: bool = False
    lora_rank: int = 0
    sequences: int = 4
    length: int = 2048
    completion: int = 1024
    accumulation: int = 8
    slots: int = 0
    sampled_length: int = 2048
    teacher_hidden: int = 0
    top_k: int = 64
    processes: int = 1
    parallel: Literal["ddp", "sharded"] = "ddp"

    @property
    def tokens(self) -> int:
        """Tokens of one forward pass."""
        return self.sequences * self.length


def setup_of(config: Config, stage: str, processes: int = 1, teacher_hidden: int = 0) -> Setup:
    """What `stage` (non_policy or policy) of a run as configured needs; `processes` are its GPUs.

    Sequences count as long as they may become, data.max_length.
    """
    models, training, length = config.models, config.training, config.data.max_length
    options = config.non_policy_distillation if stage == "non_policy" else config.policy_distillation
    wide = 4 if models.torch_dtype == "float32" else 2
    frozen: float = NF4_BYTES if models.student_load_in_4bit else INT8_BYTES if models.student_load_in_8bit else wide
    policy, evaluation = config.policy_distillation, config.evaluation
    slots = evaluation.batch_size if stage == "non_policy" else max(policy.rollout_slots, evaluation.batch_size)
    return Setup(
        weight_bytes=wide,
        frozen_bytes=frozen,
        autocast=wide == 4 and bool(training.extra.get("bf16") or training.extra.get("fp16")),
        checkpointing=training.gradient_checkpointing or bool(training.extra.get("gradient_checkpointing")),
        lora_rank=models.lora_rank,
        sequences=options.batch_size,
        length=length,
        completion=min(options.max_new_tokens, length - 1),
        accumulation=options.gradient_accumulation_steps,
        slots=0 if policy.rollout_engine == "vllm" else slots,
        sampled_length=length,
        teacher_hidden=teacher_hidden if options.distribution == "full" else 0,
        top_k=options.top_k,
        processes=processes,
        parallel="sharded" if training.parallel in ("fsdp", "deepspeed") and processes > 1 else "ddp",
    )


@dataclass(frozen=True)
class Estimate:
    """Bytes on one GPU by what they are for, and the sums at the moments of a run that may be its largest."""

    parts: dict[str, float]
    moments: dict[str, float]

    @property
    def peak(self) -> float:
        """Bytes at the largest moment."""
        return max(self.moments.values())


def layer_bytes(shape: Shape, setup: Setup) -> float:
    """Bytes that autograd keeps of one layer for each token: inputs of matrices, norms in float32, MLP and attention.

    Three cases for weights that train: 16 bits throughout, float32 weights under autocast, float32 throughout. Adapters
    keep the inputs of their own matrices (in float32 without autocast) and no others. Tests hold each case against
    what autograd really keeps.
    """
    h, q, k, f = shape.hidden, shape.queries, shape.keys, shape.mlp
    narrow = setup.autocast or setup.weight_bytes == 2
    sums = 8 + 8 * shape.heads + 4 * shape.kv_heads  # of norms and attention, in float32
    if setup.lora_rank:
        sums += 7 * setup.lora_rank * (2 if setup.autocast else 4)
        if setup.autocast:
            return 18 * h + 10 * q + 8 * k + 8 * f + sums
        return (28 * h + 12 * q + 8 * k + 10 * f if narrow else 16 * h + 12 * q + 12 * k + 16 * f) + sums
    if setup.autocast:
        return 26 * h + 10 * q + 10 * k + 8 * f + sums
    return (16 * h + 10 * q + 10 * k + 8 * f if narrow else 24 * h + 16 * q + 16 * k + 16 * f) + sums


def loss_bytes(shape: Shape, setup: Setup) -> tuple[float, float]:
    """(bytes while the loss runs, bytes that stay until the backward pass) of LM head and loss."""
    v, h, positions = shape.vocab, shape.hidden, setup.sequences * setup.completion
    size = 2 if setup.autocast or setup.weight_bytes == 2 else 4
    each = 2 * size if setup.teacher_hidden else size
    once = max(1, int(ONCE_BYTES // (each * v)))
    trains = not setup.lora_rank
    if positions > once and trains:
        block = max(BLOCK_IDS, BLOCK_BYTES // (each * positions))
        logits = each * block * positions + 4 * positions * h
    else:
        logits = each * v * min(positions, once)
    teacher = positions * (2 * setup.teacher_hidden if setup.teacher_hidden else 16 * setup.top_k)
    copy = 2 * v * h if setup.autocast else 0
    stay = (setup.weight_bytes * v * h if trains else 0) + size * positions * h
    return logits + copy + teacher, stay


def sampling_bytes(shape: Shape, setup: Setup, *, training: bool = True) -> tuple[float, float]:
    """(keys and values of all slots, what a forward pass takes beside them) while the student samples; autocast is on
    from where `training` has begun.
    """
    size, autocast = setup.weight_bytes, setup.autocast and training
    # Keys leave their norm in float32 under autocast, and transformers' cache keeps values like keys (up to 5.23).
    each = shape.layers * shape.keys * 2.0 * size
    # A step reads keys and values repeated for every query head, one layer at a time.
    narrow = 2 if autocast else size
    step = 2.0 * narrow * shape.queries * setup.slots * setup.sampled_length
    prompts = min(PREFILL_TOKENS, setup.slots * max(setup.sampled_length - setup.completion, 1))
    wide = 6 * shape.mlp + 2 * shape.hidden if setup.lora_rank else 0  # adapters read their inputs in float32
    reading = prompts * (each + 5 * size * shape.hidden + 3 * narrow * shape.mlp + wide)
    copies = 2.0 * (shape.linear_weights + shape.head_weights) if autocast and size == 4 else 0.0
    return each * setup.slots * setup.sampled_length, max(step, reading) + copies


def student_memory(shape: Shape, setup: Setup) -> Estimate:
    """The estimate for a student of `shape` in one stage; all in bytes on one GPU, without CUDA's own."""
    rank, ddp = setup.lora_rank, setup.parallel == "ddp"
    trained = shape.adapter_weights(rank) if rank else shape.weights
    others = shape.weights - shape.linear_weights
    narrow = setup.autocast or setup.weight_bytes == 2
    held, width = float(setup.weight_bytes * shape.weights), setup.weight_bytes
    if rank:  # adapters are kept in float32
        held, width = setup.frozen_bytes * shape.linear_weights + setup.weight_bytes * others + 4 * trained, 4
    share = 1 if ddp else setup.processes
    weights, gradients, optimiser = held / share, width * trained / share, 2 * width * trained / share

    layer = layer_bytes(shape, setup) * setup.tokens
    every = setup.weight_bytes * shape.hidden * setup.tokens * shape.layers if setup.checkpointing else 0.0
    kept = every or layer * shape.layers
    working = (layer if setup.checkpointing else 0.0) + 6 * (2 if narrow else 4) * shape.mlp * setup.tokens
    cast = 2.0 * shape.linear_weights if setup.autocast and setup.weight_bytes == 4 else 0.0
    if setup.checkpointing and rank:
        cast = 0.0
    later = 0.0 if setup.checkpointing else cast
    if not ddp:  # the weights of a layer and of the next one are gathered when it runs, embeddings and head all along
        cast = later = (2 if narrow else 4) * (2.0 * shape.linear_weights / shape.layers + others)
    loss, stay = loss_bytes(shape, setup)
    head = 2.0 * setup.teacher_hidden * shape.vocab
    cache, beside = sampling_bytes(shape, setup)
    whole = 0.0 if ddp else held
    embeddings = 0.0 if rank else float(width * shape.head_weights)

    always = weights + optimiser + head
    summed = gradients if setup.accumulation > 1 else 0.0
    moments = {
        "loss": always + summed + kept + cast + loss + stay,
        "backward pass begins": always + summed + kept + later + stay + working,
        "backward pass ends": always + gradients + embeddings * (2 if shape.tied and setup.accumulation > 1 else 1),
    }
    if setup.slots:
        moments["sampling"] = always + whole + cache + beside
        moments["measuring before training"] = held + head + sum(sampling_bytes(shape, setup, training=False))
    parts = {
        "weights": weights,
        "gradients": gradients,
        "optimiser states": optimiser,
        "activations": kept + working,
        "weights in 16 bits, or gathered": cast,
        "LM head and loss": loss + stay,
        "teacher's LM head": head,
        "rollouts: keys and values": cache,
        "rollouts: forward pass": beside if setup.slots else 0.0,
        "rollouts: weights gathered": whole if setup.slots else 0.0,
    }
    return Estimate({name: size for name, size in parts.items() if size}, moments)
