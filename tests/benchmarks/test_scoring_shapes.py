"""The benchmark's models are what their names say, and load."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from benchmarks.scoring.shapes import QWEN3_TOKENS, SHAPES, write
from benchmarks.scoring.tokenizer import SPECIAL, byte_letters, write_tokenizer
from teacher_server.backends.text import HuggingFaceText

BILLIONS = {"qwen3-8b": 8.19, "qwen3-30b-a3b": 30.5, "qwen3-235b-a22b-int4": 235.1}


def parameters(c: Any) -> int:
    """Weights of a Qwen3 or Qwen3-MoE configuration, norms left out."""
    attention = c.hidden_size * c.head_dim * 2 * (c.num_attention_heads + c.num_key_value_heads)
    if c.model_type == "qwen3_moe":
        block = c.num_experts * (3 * c.hidden_size * c.moe_intermediate_size + c.hidden_size)
    else:
        block = 3 * c.hidden_size * c.intermediate_size
    return c.num_hidden_layers * (attention + block) + 2 * c.vocab_size * c.hidden_size


@pytest.mark.parametrize("name", sorted(BILLIONS))
def test_a_named_shape_loads_and_has_as_many_parameters_as_its_name_says(name: str, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(str(write(SHAPES[name], tmp_path)))
    assert parameters(config) / 1e9 == pytest.approx(BILLIONS[name], rel=0.01)
    assert config.vocab_size == 151_936
    assert config.rope_parameters["rope_theta"] == 1_000_000.0
    assert config.tie_word_embeddings is False


def test_the_made_up_tokenizer_has_qwen3s_ids(tmp_path: Path) -> None:
    text = HuggingFaceText(write(SHAPES["qwen3-8b"], tmp_path))
    assert text.vocab_size == QWEN3_TOKENS
    assert text.think_ids == (151_667, 151_668)
    assert text.eos_token_ids == (151_645,)
    assert len(text.modes) == 2


def test_the_made_up_tokenizer_keeps_bytes(tmp_path: Path) -> None:
    text = HuggingFaceText(write(SHAPES["tiny"], tmp_path))
    said = "héllo 世界 <think>\n"
    assert text.decode(text.encode(said)) == said
    assert len(set(byte_letters())) == 256


def test_the_tiny_shape_has_weights_that_load(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(write(SHAPES["tiny"], tmp_path)))
    assert model.config.vocab_size == 2_048


def test_a_tokenizer_that_is_too_small_for_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"at least {256 + len(SPECIAL)}"):
        write_tokenizer(tmp_path, 100)
