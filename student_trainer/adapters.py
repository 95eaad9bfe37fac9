"""LoRA and QLoRA: adapters on a student, in a folder, and merged into the weights that they belong to.

An adapter lies in PEFT's format: in the folder that was named, or, beside merged weights, in its `adapter`. It names
its base. Merging loads the base anew in a 16- or 32-bit type, so that a base that was trained on in 4 bits is not
merged into in 4 bits. Knows PEFT; not the Trainer, and no tokenizer.
"""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from .config import Models
from .errors import UserError

log = logging.getLogger(__name__)

INSIDE = "adapter"
"""Folder of the adapter inside a model folder with merged weights."""
CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder, the base that it changes, and its rank. `alone`: no merged weights lie around it."""

    folder: Path
    base: str
    rank: int
    alone: bool


def find(source: str | Path) -> Adapter | None:
    """The adapter in a model folder or checkpoint, or None; UserError where its adapter_config.json is unusable."""
    path = Path(source).expanduser()
    for folder, alone in ((path, True), (path / INSIDE, False)):
        file = folder / CONFIG
        if not file.is_file():
            continue
        try:
            about = json.loads(file.read_text(encoding="utf-8"))
            return Adapter(folder, str(about["base_model_name_or_path"]), int(about["r"]), alone)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} describes no LoRA adapter ({type(error).__name__}: {error})") from error
    return None


def starting_point(models: Models, source: str) -> tuple[str, Adapter | None]:
    """What to load for `source`: the model's name, and the adapter to put on it.

    With `lora_rank` an adapter of that rank goes on being trained, on its own base. UserError where one of another
    rank is all there is.
    """
    found = find(source)
    if found is None or (not found.alone and found.rank != models.lora_rank):
        return source, None
    if models.lora_rank and found.rank != models.lora_rank:
        raise UserError(
            f"the adapter in {found.folder} has rank {found.rank}, {models.lora_rank} is configured",
            "models.lora_rank",
            f"set it to {found.rank}, or merge the adapter first: python -m student_trainer export {source} FOLDER",
        )
    return found.base, found


def quantisation(models: Models, dtype: torch.dtype | str) -> dict[str, Any]:
    """Arguments of from_pretrained that load the frozen student in 4 or 8 bits (bitsandbytes); empty for none."""
    if not (models.student_load_in_4bit or models.student_load_in_8bit):
        return {}
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_8bit=True)
    if models.student_load_in_4bit:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32 if dtype == "auto" else dtype,
        )
    return {
        "quantization_config": config,
        "device_map": {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"},
    }


def attach(model: Any, models: Models, adapter: Adapter | None) -> Any:
    """`model` with frozen weights and trainable adapters: those of `adapter`, or new ones, which change nothing yet.

    UserError where `lora_targets` names no linear layer, or the LM head, whose weight the losses read themselves, or
    the embeddings, which may be tied to it.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    if adapter is not None:
        log.info("going on with the adapter in %s", adapter.folder)
        with _old_names():
            return PeftModel.from_pretrained(model, adapter.folder, is_trainable=True)
    config = LoraConfig(
        r=models.lora_rank,
        lora_alpha=models.lora_alpha,
        lora_dropout=models.lora_dropout,
        target_modules=list(models.lora_targets) or "all-linear",
        bias="none",
        task_type="CAUSAL_LM",
    )
    outside = [model.get_input_embeddings(), model.get_output_embeddings()]
    for name, module in model.named_modules():
        if any(module is m for m in outside) and name.rsplit(".", 1)[-1] in models.lora_targets:
            raise _wrong_targets(models, "embeddings and LM head take no adapter", model)
    try:
        with _old_names():
            wrapped = get_peft_model(model, config)
    except ValueError as error:
        raise _wrong_targets(models, str(error).splitlines()[0], model) from error
    return wrapped


@contextmanager
def _old_names() -> Iterator[None]:
    """PEFT asks transformers for a name of before 5.20, which nobody here can change."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield


def _wrong_targets(models: Models, why: str, model: Any) -> UserError:
    names = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)})
    step = f"name some of {', '.join(n for n in names if n not in ('lm_head', 'base_layer'))}, or none for all"
    return UserError(f"{', '.join(models.lora_targets)}: {why}", "models.lora_targets", step)


def put_on(base: Any, adapter: Adapter) -> Any:
    """The adapter's base with the adapter on it, as PEFT's model; `merge_and_unload` adds it to the weights."""
    from peft import PeftModel

    with _old_names():
        return PeftModel.from_pretrained(base, adapter.folder)


def merge(base: Any, adapter: Adapter) -> Any:
    """The adapter's base, which must not be quantised, with the adapter added to its weights, all trainable."""
    return put_on(base, adapter).merge_and_unload().requires_grad_(True)


def complete(folder: Path, models: Models, dtype: torch.dtype | str) -> None:
    """Makes a written folder with an adapter one that loads by itself: merged weights, and the adapter inside."""
    inside = folder / INSIDE
    inside.mkdir()
    for file in folder.glob("adapter_*"):
        shutil.move(file, inside / file.name)
    adapter = find(folder)
    assert adapter is not None, f"no adapter was written to {folder}"
    base = AutoModelForCausalLM.from_pretrained(adapter.base, dtype=dtype, trust_remote_code=models.trust_remote_code)
    merge(base, adapter).save_pretrained(folder)


def describe_base(model: Any, folder: Path) -> None:
    """Adds the student's config.json and generation_config.json to a folder with an adapter."""
    causal = model.get_base_model()
    config = type(causal.config).from_dict(causal.config.to_dict())
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.save_pretrained(folder)
    causal.generation_config.save_pretrained(folder)
