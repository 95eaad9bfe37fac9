"""What a teacher's node holds on each GPU under vLLM with tensor parallelism: weights, activations, the read-out of
log-probabilities, and how many tokens of keys and values the rest has room for.

vLLM takes a share of the GPU's memory and gives whatever the model leaves of it to keys and values, so the question is
how many tokens these hold. Bytes, on one GPU; docs/models.md has the formulas.
"""

from __future__ import annotations

from dataclasses import dataclass

from student_trainer.memory.shapes import Shape

GIB = 2**30
WEIGHT_BYTES: dict[str, float] = {"bfloat16": 2.0, "fp8": 1.0, "int4": 0.53}
"""Bytes of a weight of the layers' matrices; int4 with a 16-bit scale and zero point for each 128."""
BATCHED_TOKENS = 8192
"""Tokens of one forward pass: vLLM's max_num_batched_tokens on large GPUs."""
READOUT_ROWS = 2048
"""Positions whose logits are read out at once, in float32."""
ENGINE_BYTES = 2.0 * GIB
"""What CUDA, NCCL and captured graphs take beside that; assumed, not measured."""
UTILIZATION = 0.90
"""vLLM's gpu_memory_utilization."""


@dataclass(frozen=True)
class TeacherEstimate:
    """Bytes on one of `gpus` GPUs by what they are for; `room_tokens` of keys and values fit beside them (0: it does
    not fit), in all, `token_bytes` each on one GPU."""

    gpus: int
    form: str
    parts: dict[str, float]
    room_tokens: int
    token_bytes: float

    @property
    def fixed(self) -> float:
        """Bytes beside keys and values."""
        return sum(self.parts.values())


def weight_bytes(shape: Shape, form: str) -> float:
    """Bytes of all weights; embeddings, LM head and norms stay in 16 bits."""
    return WEIGHT_BYTES[form] * shape.linear_weights + 2.0 * (shape.weights - shape.linear_weights)


def teacher_memory(shape: Shape, form: str = "bfloat16", gpus: int = 0, gpu_bytes: float = 80 * GIB) -> TeacherEstimate:
    """The estimate for `gpus` GPUs of `gpu_bytes`; 0 takes the fewest of 1, 2, 4, 8, ... whose weights leave some room.

    Keys and values are split over min(gpus, kv_heads) GPUs and repeated on the others.
    """
    if gpus == 0:
        gpus = 1
        while weight_bytes(shape, form) / gpus > 0.85 * UTILIZATION * gpu_bytes and gpus < 1024:
            gpus *= 2
    wide = max(4 * shape.hidden, 3 * shape.mlp // gpus, (shape.queries + 2 * shape.keys) // gpus)
    parts = {
        "weights": weight_bytes(shape, form) / gpus,
        "activations of a batch": 2.0 * BATCHED_TOKENS * (3 * shape.hidden + wide),
        "log-probabilities": 4.5 * READOUT_ROWS * shape.vocab / gpus,
        "CUDA, NCCL, graphs (assumed)": ENGINE_BYTES,
    }
    each = 2 * 2.0 * shape.layers * shape.keys / min(gpus, shape.kv_heads)
    left = UTILIZATION * gpu_bytes - sum(parts.values())
    return TeacherEstimate(gpus, form, parts, max(0, int(left / each)), each)
