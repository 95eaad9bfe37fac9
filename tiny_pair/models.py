"""The architectures of the pair: genuine Qwen3, small. Knows sizes; knows neither the task nor training."""

from typing import Any

LOGITS_WIDTH = 320
"""Rows of the embedding: more than the tokenizer has tokens, so that padded rows are exercised as in Qwen3."""
CONTEXT_LENGTH = 512

ARCHITECTURES: dict[str, dict[str, int]] = {
    "teacher": {"hidden_size": 224, "num_hidden_layers": 4, "intermediate_size": 576, "num_attention_heads": 8},
    "student_base": {"hidden_size": 128, "num_hidden_layers": 3, "intermediate_size": 320, "num_attention_heads": 4},
}


def build_model(role: str, *, eos_token_id: int, pad_token_id: int, **changes: int) -> Any:
    """A freshly initialised `Qwen3ForCausalLM` in float32 with tied embeddings."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = ARCHITECTURES[role] | changes
    config = Qwen3Config(
        vocab_size=LOGITS_WIDTH,
        **sizes,
        num_key_value_heads=sizes["num_attention_heads"] // 2,
        head_dim=32,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        initializer_range=0.02,
    )
    return Qwen3ForCausalLM(config)
