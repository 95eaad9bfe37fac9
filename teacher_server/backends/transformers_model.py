"""Loads a causal language model of transformers as the options ask.

Knows devices, dtypes, quantisation and attention; knows no queue, no batch and no read-out.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from teacher_server.backends.model_files import weight_files
from teacher_server.backends.options import BackendOptions

_LOG = logging.getLogger(__name__)
_LOADING = threading.Lock()
"""transformers swaps functions of its classes while it loads; two loads at once leave weights untied for good."""
ALONE = 0.6
"""Share of a GPU's memory that weights may take on it alone; keys, values and activations need the rest."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model ready to run and what was decided about it."""

    model: Any
    decoder: nn.Module
    config: Any
    device: torch.device
    dtype: torch.dtype
    attention: str
    quantization: str
    max_tokens: int
    length_boundary: int

    @property
    def dtype_name(self) -> str:
        """The dtype as the contract writes it, for example "bfloat16"."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def packs(self) -> bool:
        """Whether sequences are concatenated without padding (FlashAttention's variable-length kernels)."""
        return self.attention == "flash_attention_2"


def engine_name() -> str:
    """Engine and version, as GetTeacher reports them."""
    return f"transformers {transformers.__version__}"


def load(folder: Path, options: BackendOptions) -> LoadedModel:
    """The model in `folder`; ValueError in plain words, with the next step, for what the operator can mend."""
    device = _device(options.device)
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=options.trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"the configuration in {folder} does not load: {error}") from error
    dtype = _dtype(options.dtype, config, device)
    arguments: dict[str, Any] = {"dtype": dtype}
    attention = _attention(options.attn_implementation, device, dtype, config)
    if attention:
        arguments["attn_implementation"] = attention
    if options.quantization != "none":
        arguments["quantization_config"] = _bitsandbytes(options.quantization, dtype)
    if device.type == "cuda":
        one = torch.cuda.device_count() == 1 or _fits_first(folder, config, dtype)
        arguments["device_map"] = {"": 0} if one else "auto"
    elif options.quantization != "none":
        arguments["device_map"] = {"": "cpu"}
    try:
        model = _from_pretrained(folder, options, arguments)
    except ValueError as error:
        if options.attn_implementation != "auto" or not attention:
            raise
        _LOG.warning("loading with %s failed, trying without: %s", attention, error)
        del arguments["attn_implementation"]
        model = _from_pretrained(folder, options, arguments)
    model.eval().requires_grad_(False)
    if device.type == "cpu":
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()  # a mapped file that is written over would change the fingerprint's model
    longest, boundary = _lengths(config)
    return LoadedModel(
        model=model,
        decoder=model.get_decoder(),
        config=config,
        device=model.get_input_embeddings().weight.device,
        dtype=dtype,
        attention=str(model.config._attn_implementation),
        quantization=options.quantization,
        max_tokens=longest,
        length_boundary=boundary,
    )


def _from_pretrained(folder: Path, options: BackendOptions, arguments: dict[str, Any]) -> Any:
    try:
        with _LOADING:
            model, report = AutoModelForCausalLM.from_pretrained(
                str(folder),
                trust_remote_code=options.trust_remote_code,
                local_files_only=True,
                output_loading_info=True,
                **arguments,
            )
    except torch.cuda.OutOfMemoryError as error:
        raise ValueError(
            f"{options.model} does not fit the GPU's memory in {options.dtype}; use --quantization 4bit, a smaller "
            "model, or more GPUs"
        ) from error
    except (OSError, ValueError, ImportError, RuntimeError, KeyError, SafetensorError) as error:
        where = f" with --quantization {options.quantization}" if options.quantization != "none" else ""
        step = "try --quantization none or a CUDA GPU" if where else "check the folder and the transformers version"
        raise ValueError(f"{options.model} does not load{where}: {error}; {step}") from error
    absent = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    if absent:
        raise ValueError(
            f"{len(absent)} weights of {options.model} are missing or have another shape, for example {absent[0]}; "
            "they would be random numbers: check that the download is complete and that the model is a causal LM"
        )
    return model


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda was asked for, but PyTorch sees no CUDA GPU; use --device cpu or auto")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def _fits_first(folder: Path, config: Any, dtype: torch.dtype) -> bool:
    """Whether the weights take less than ALONE of the first GPU's free memory: then the others only slow it down."""
    own = getattr(config, "dtype", None)
    wider = dtype.itemsize / own.itemsize if isinstance(own, torch.dtype) else 1.0
    taken = wider * sum(file.stat().st_size for file in weight_files(folder))
    return taken < ALONE * torch.cuda.mem_get_info(0)[0]


def _dtype(name: str, config: Any, device: torch.device) -> torch.dtype:
    if name != "auto":
        return _DTYPES[name]
    own = getattr(config, "dtype", None)
    return own if device.type == "cuda" and isinstance(own, torch.dtype) else torch.float32


def _attention(name: str, device: torch.device, dtype: torch.dtype, config: Any) -> str:
    """The implementation to ask for; "" leaves it to transformers: sdpa, or eager for models that lack it."""
    from transformers.utils import is_flash_attn_2_available

    half = dtype in (torch.bfloat16, torch.float16)
    if name == "flash_attention_2":
        if device.type != "cuda" or not is_flash_attn_2_available() or not half:
            raise ValueError(
                "flash_attention_2 needs a CUDA GPU, the flash-attn package and bfloat16 or float16; "
                "install flash-attn or use --attn-implementation auto"
            )
        return name
    # Some releases of transformers run sdpa for capped attention scores and leave the cap out.
    capped = getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None) is not None
    if name == "sdpa" and capped:
        raise ValueError("this model caps its attention scores, which sdpa cannot; use --attn-implementation eager")
    if name == "auto":
        flash = device.type == "cuda" and half and is_flash_attn_2_available()
        return "flash_attention_2" if flash else "eager" if capped else ""
    return name


def _bitsandbytes(quantization: str, dtype: torch.dtype) -> Any:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"--quantization {quantization} needs bitsandbytes ({error}); pip install 'strong2weak[bitsandbytes]'"
        ) from error
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True
    )


def _lengths(config: Any) -> tuple[int, int]:
    """The longest sequence the positions allow (0 where unbounded), and the length at which positions change."""
    text = config.get_text_config(decoder=True)
    longest = int(getattr(text, "max_position_embeddings", 0) or 0)
    rope = getattr(text, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default") if isinstance(rope, dict) else "default"
    original = int(rope.get("original_max_position_embeddings", 0) or 0) if isinstance(rope, dict) else 0
    if kind == "dynamic":
        _LOG.warning("dynamic RoPE depends on what was scored before; sequences are limited to %d tokens", longest)
        return (min(longest, original) if original else longest), 0
    return longest, original if kind == "longrope" else 0
