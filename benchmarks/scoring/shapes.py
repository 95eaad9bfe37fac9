"""Models of a named shape, written as a folder without weights: configuration and a byte-level tokenizer.

An engine fills such a model with random numbers (vLLM: `load_format: dummy`); `tiny` gets real, random weights, so that
every backend loads it. It knows files, no engine.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.scoring.tokenizer import SPECIAL, write_tokenizer

QWEN3_TOKENS = 151_669
"""Real tokens of Qwen3; its logits are padded to 151,936."""

QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "use_cache": True,
}
QWEN3_MOE = QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}
GPTQ_INT4: dict[str, Any] = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 128,
    "desc_act": False,
    "sym": True,
    "lm_head": False,
    "modules_in_block_to_quantize": [f"self_attn.{name}_proj" for name in "qkvo"] + ["mlp.experts"],
}
"""As published int4 checkpoints of Qwen3-235B-A22B have it: attention and experts, not the router, not the head. Naming
the modules keeps vLLM from looking into weight files, which are not there."""


@dataclass(frozen=True)
class Shape:
    """`config` is config.json; `tokens` the real vocabulary; `engine_args` vLLM's arguments beside the common ones;
    `bar` the least share of the prefill-only rate that top-64 over gRPC must reach, None where none was set."""

    config: Mapping[str, Any]
    tokens: int = QWEN3_TOKENS
    dtype: str = "bfloat16"
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    bar: float | None = None
    weights: bool = False
    """Whether random weights are written, instead of left to the engine."""


DUMMY: dict[str, Any] = {"load_format": "dummy", "enforce_eager": True, "max_num_seqs": 128}
SHAPES = {
    "tiny": Shape(
        QWEN3
        | {
            "vocab_size": 2_048,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 4_096,
        },
        tokens=2_000,
        dtype="float32",
        engine_args={"enforce_eager": True, "max_num_seqs": 8, "distributed_executor_backend": "uni"},
        weights=True,
    ),
    "qwen3-8b": Shape(
        QWEN3
        | {
            "hidden_size": 4_096,
            "intermediate_size": 12_288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
        engine_args=DUMMY | {"gpu_memory_utilization": 0.85},
        bar=0.85,
    ),
    "qwen3-30b-a3b": Shape(
        QWEN3_MOE
        | {
            "hidden_size": 2_048,
            "intermediate_size": 6_144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
        },
        engine_args=DUMMY | {"gpu_memory_utilization": 0.88},
    ),
    "qwen3-235b-a22b-int4": Shape(
        QWEN3_MOE
        | {
            "hidden_size": 4_096,
            "intermediate_size": 12_288,
            "moe_intermediate_size": 1_536,
            "num_hidden_layers": 94,
            "num_attention_heads": 64,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "quantization_config": GPTQ_INT4,
        },
        engine_args=DUMMY | {"gpu_memory_utilization": 0.92},
        bar=0.95,
    ),
}


def write(shape: Shape, folder: Path, tokenizer: Path | None = None) -> Path:
    """Writes the model's folder; `tokenizer` is a folder whose tokenizer files are taken instead of made."""
    folder.mkdir(parents=True, exist_ok=True)
    base = shape.tokens - len(SPECIAL)
    ends = {"bos_token_id": base, "eos_token_id": base + SPECIAL.index("<|im_end|>"), "pad_token_id": base}
    config = {**shape.config, **ends, "torch_dtype": shape.dtype}
    (folder / "config.json").write_text(json.dumps(config, indent=2), "utf-8")
    generation = {**ends, "do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2), "utf-8")
    if tokenizer is None:
        write_tokenizer(folder, shape.tokens)
    else:
        for path in [*tokenizer.glob("*token*"), *tokenizer.glob("*.txt"), *tokenizer.glob("*.jinja")]:
            shutil.copy(path, folder / path.name)
    if shape.weights:
        _write_weights(folder)
    return folder


def _write_weights(folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(str(folder)))
    model.save_pretrained(str(folder))
