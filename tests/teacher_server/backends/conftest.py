"""Tiny random models of several architectures in temporary folders, and backends over them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from teacher_server.backends.options import BackendOptions
from teacher_server.backends.transformers_backend import TransformersBackend

Saver = Callable[[str], Path]

PADDED_VOCAB = 320
"""Width of the models' logits; the tokenizer knows 261 ids."""

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'bad' %}{{ raise_exception('no such role') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def save_tokenizer(folder: Path, template: str | None = TEMPLATE) -> None:
    """A byte-level tokenizer with ChatML's special tokens and think tags that are not special, as Qwen3's."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(t, special=True) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    raw.add_tokens([AddedToken(t, special=False, normalized=False) for t in ("<think>", "</think>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    if template is not None:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def config_of(kind: str) -> Any:
    """The configuration of one tiny architecture."""
    import transformers as t

    shape: dict[str, Any] = {
        "vocab_size": PADDED_VOCAB,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": 258,
        "pad_token_id": 256,
        "tie_word_embeddings": False,
    }
    if kind == "qwen3":
        return t.Qwen3Config(**shape)
    if kind == "qwen3_moe":
        moe = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
        return t.Qwen3MoeConfig(**shape, **moe)
    if kind == "llama":
        return t.LlamaConfig(**shape)
    if kind == "gemma2":
        return t.Gemma2Config(**{**shape, "query_pre_attn_scalar": 16}, sliding_window=8, final_logit_softcapping=3.0)
    if kind == "granite":
        return t.GraniteConfig(**{k: v for k, v in shape.items() if k != "head_dim"}, logits_scaling=7.0)
    if kind == "gpt2":
        return t.GPT2Config(
            vocab_size=PADDED_VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=512, initializer_range=0.2,
            bos_token_id=258, eos_token_id=258,
        )  # fmt: skip
    raise AssertionError(kind)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saver:
    """Makes the folder of a kind of model once."""
    made: dict[str, Path] = {}

    def save(kind: str) -> Path:
        if kind not in made:
            from transformers import AutoModelForCausalLM

            folder = tmp_path_factory.mktemp(kind)
            torch.manual_seed(7)
            model = AutoModelForCausalLM.from_config(config_of(kind))
            model.generation_config.eos_token_id = [258, 256]
            model.generation_config.pad_token_id = 256
            model.save_pretrained(folder)
            save_tokenizer(folder)
            made[kind] = folder
        return made[kind]

    return save


@pytest.fixture(scope="session")
def started(saved: Saver) -> Iterator[Callable[..., TransformersBackend]]:
    """Starts backends, one for each kind and set of options, and closes them at the end."""
    running: dict[Any, TransformersBackend] = {}

    def start(kind: str, **options: Any) -> TransformersBackend:
        key = (kind, *sorted(options.items()))
        if key not in running:
            backend = TransformersBackend(BackendOptions(model=str(saved(kind)), device="cpu", **options))
            asyncio.run(backend.start())
            running[key] = backend
        return running[key]

    yield start
    for backend in running.values():
        asyncio.run(backend.close())
