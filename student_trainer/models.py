"""Loads the student and its tokenizer, from a folder or a hub id.

Knows transformers and the `models` part of the configuration. Knows no teacher and no training. Whatever a user can
get wrong about a path or a machine ends in a UserError that says what to do.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from . import adapters
from .config import Config
from .errors import UserError


def resolve_attention(implementation: str) -> str:
    """`auto` is FlashAttention 2 where it is installed and a GPU is there, else torch's own fused attention."""
    if implementation != "auto":
        return implementation
    return "flash_attention_2" if torch.cuda.is_available() and find_spec("flash_attn") else "sdpa"


def resolve_dtype(name: str) -> torch.dtype | str:
    """The torch dtype of a configured name: float32, bfloat16 or float16; `auto`, the checkpoint's, stays."""
    if name == "auto":
        return name
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UserError(f"models.torch_dtype: {name!r} is no floating-point type; use float32, bfloat16 or float16")
    return dtype


def _looks_local(source: str) -> bool:
    return source.startswith((".", "/", "~")) or source.count("/") != 1 or Path(source.split("/")[0]).is_dir()


def _checked(source: str | Path) -> str:
    """The source as transformers wants it; UserError for a folder that is not there or holds no model."""
    text = str(source)
    path = Path(text).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file() and adapters.find(path) is None:
            models = sorted(p.parent.name for p in path.glob("*/config.json"))
            hint = f"; it holds {', '.join(models)}, name one of them" if models else ""
            raise UserError(f"{text} is no model folder: it has no config.json{hint}")
        return str(path)
    if path.exists():
        raise UserError(f"{text} is a file; a student is a folder with config.json and model.safetensors")
    if _looks_local(text) and "/" in text:
        raise UserError(f"there is no folder {text} (looked in {Path.cwd()}); check the path of the student model")
    return text


def _explain(error: Exception, source: str) -> UserError:
    return UserError(
        f"the student {source!r} could not be loaded: {str(error).strip().splitlines()[0]} (check the name, the "
        "network, and HF_ENDPOINT where a mirror is used)"
    )


def load_tokenizer(config: Config, source: str | Path) -> Any:
    """The tokenizer of `source`, padding on the left; it must have a chat template and a padding or end token."""
    name = _with(source, "tokenizer_config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=config.models.trust_remote_code)
    except (OSError, ValueError) as error:
        raise _explain(error, name) from error
    if not tokenizer.chat_template:
        raise UserError(f"the tokenizer of {name} has no chat template; use a chat model or add chat_template.jinja")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise UserError(f"the tokenizer of {name} has neither a pad nor an end token; set one in tokenizer_config.json")
    tokenizer.padding_side = "left"
    return tokenizer


def load_student(config: Config, source: str | Path | None = None) -> Any:
    """The student of `source` (default models.student_model) in the configured dtype, in training mode, with adapters
    where these are configured; on the CPU, a quantised one on the device that it trains on.

    An adapter in `source` goes on being trained, or is merged into the weights where all of these are trained.
    """
    models = config.models
    dtype, attention = resolve_dtype(models.torch_dtype), resolve_attention(models.attn_implementation)
    name, adapter = adapters.starting_point(models, _checked(source or models.student_model))
    name = _checked(name)
    if Path(name).is_dir():
        name = str(Path(name).resolve())  # what an adapter says of its base must hold in other folders too
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=models.trust_remote_code,
            **adapters.quantisation(models, dtype),
        )
        if adapter is not None and not models.lora_rank:
            model = adapters.merge(model, adapter)
    except (OSError, ValueError, ImportError) as error:
        raise _explain(error, name) from error
    except torch.cuda.OutOfMemoryError as error:
        raise UserError(f"the student {name} does not fit the GPU's memory in {config.models.torch_dtype}") from error
    if not getattr(model, "is_quantized", False):
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()  # away from the mapped file, whose writer would else change the weights
    if models.lora_rank:
        model = adapters.attach(model, models, adapter)
    return model.train()


def complete_model(folder: Path, config: Config) -> None:
    """Merges the adapter that was written to a model folder, where there is one and that is wanted."""
    if config.models.lora_rank and config.models.merge_adapters:
        adapters.complete(folder, config.models, resolve_dtype(config.models.torch_dtype))


def _with(source: str | Path, file: str) -> str:
    """`source`, or the base of the adapter in it where `source` is a folder without `file`."""
    name = _checked(source)
    adapter = adapters.find(name)
    return _checked(adapter.base) if adapter is not None and not (Path(name) / file).is_file() else name


@dataclass(frozen=True)
class Description:
    """What a handshake compares, without weights: tokenizer, logits of a position (padding included), end ids; and the
    longest sequence that the model was made for, where it says so.
    """

    tokenizer: Any
    logits_width: int
    eos_ids: tuple[int, ...]
    positions: int | None = None


def describe(config: Config, source: str | Path) -> Description:
    """The student of `source` as its files describe it; UserError where they cannot be read."""
    name, tokenizer = _with(source, "config.json"), load_tokenizer(config, source)
    try:
        model = AutoConfig.from_pretrained(name, trust_remote_code=config.models.trust_remote_code)
    except (OSError, ValueError) as error:
        raise _explain(error, name) from error
    try:
        generation = GenerationConfig.from_pretrained(name)
    except OSError:
        generation = GenerationConfig.from_model_config(model)
    text = model.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    return Description(tokenizer, int(text.vocab_size), eos_ids(generation, tokenizer), positions)


def eos_ids(generation: Any, tokenizer: Any) -> tuple[int, ...]:
    """Every id that ends an answer: the generation configuration's, or the tokenizer's."""
    ids = getattr(generation, "eos_token_id", None)
    if ids is None:
        ids = tokenizer.eos_token_id
    return tuple(int(i) for i in (ids if isinstance(ids, list | tuple) else [ids]) if i is not None)
