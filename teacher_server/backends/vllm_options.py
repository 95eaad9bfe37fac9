"""From what an operator chose to vLLM's engine arguments: what is ours, what passes through, what is refused.

Imports vLLM inside its functions. Knows options and names of arguments, no engine.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
from pathlib import Path
from typing import Any

from teacher_server.backends.options import BackendOptions

_LOG = logging.getLogger(__name__)

TESTED = ("0.32", "0.33")
"""Releases of vLLM that the tests and benchmarks ran with."""
GPU_SHARE = 0.90
"""Of a GPU's memory, for weights, keys and values; a chunk's logits and what is read from them need the rest."""
WORKER = "teacher_server.backends.vllm_worker.TeacherWorker"

OURS = {
    "model": "--model",
    "model_weights": "--model",
    "served_model_name": "--name",
    "tokenizer": "--model (its folder)",
    "dtype": "--dtype",
    "trust_remote_code": "--trust-remote-code",
    "max_model_len": "--max-sequence-tokens",
    "skip_tokenizer_init": "",
    "runner": "",
    "convert": "",
    "worker_extension_cls": "",
    "enable_log_requests": "",
    "logprobs_mode": "",
    "tokens_only": "",
    "return_sampling_mask": "",
}
"""Arguments that this server sets itself, and the option that says the same, where there is one."""


def release(version: str) -> str:
    """Major and minor number of a version."""
    return ".".join(version.split(".")[:2])


def check_version(version: str) -> None:
    """Warns where nobody has run this release."""
    if release(version) not in TESTED:
        _LOG.warning(
            "vLLM %s was not tested with this server, %s were; the self-check decides what it can do",
            version,
            " and ".join(TESTED),
        )


def engine_args(options: BackendOptions, folder: Path, longest: int) -> Any:
    """AsyncEngineArgs for a teacher; ValueError for an argument that vLLM does not know or that is not the operator's.

    `longest` is the number of tokens of the longest sequence; the engine wants room for one more.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs

    known = [field.name for field in dataclasses.fields(AsyncEngineArgs)]
    given = dict(options.vllm_engine_args)
    for name in given:
        if name in OURS:
            instead = f"use {OURS[name]}" if OURS[name] else "this server sets it"
            raise ValueError(f"vllm.engine_args.{name} cannot be chosen there: {instead}")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"vllm.engine_args.{name} is no argument of this vLLM's engine{hint}")
    from vllm.platforms import current_platform

    where = current_platform.device_type
    if options.device not in ("auto", where):
        raise ValueError(f"--device {options.device} was asked for, but this vLLM is built for {where}")
    if options.attn_implementation != "auto":
        raise ValueError(
            f"attn_implementation {options.attn_implementation} is for the transformers backend; "
            "vLLM takes vllm.engine_args.attention_backend"
        )
    chosen: dict[str, Any] = {
        "model": str(folder),
        "tokenizer": str(folder),
        "served_model_name": options.served_name,
        "dtype": "float32" if options.dtype == "auto" and where == "cpu" else options.dtype,
        "trust_remote_code": options.trust_remote_code,
        "max_model_len": longest + 1,
        "skip_tokenizer_init": True,
        "logprobs_mode": "raw_logprobs",
        "worker_extension_cls": WORKER,
        "disable_log_stats": True,
        "max_num_batched_tokens": options.batch_tokens,
        "max_logprobs": max(options.max_top_k, options.max_candidates),
    }
    if where != "cpu":
        chosen["gpu_memory_utilization"] = GPU_SHARE
    chosen |= _quantization(options, given)
    try:
        return AsyncEngineArgs(**(chosen | given))
    except (TypeError, ValueError) as error:
        raise ValueError(f"vllm.engine_args: {error}") from error


def _quantization(options: BackendOptions, given: dict[str, Any]) -> dict[str, Any]:
    if options.quantization == "none":
        return {}
    if "quantization" in given:
        raise ValueError(
            f"--quantization {options.quantization} and vllm.engine_args.quantization {given['quantization']} "
            "exclude each other; give one"
        )
    if options.quantization == "8bit":
        raise ValueError(
            "vLLM quantises to 8 bits by FP8, not by bitsandbytes: say vllm.engine_args.quantization: fp8, "
            "or use the transformers backend"
        )
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    if "bitsandbytes" not in QUANTIZATION_METHODS:
        raise ValueError(
            "this vLLM has no bitsandbytes (it left the core in 0.32); pip install vllm-bnb-plugin, or use FP8, AWQ or "
            "GPTQ through vllm.engine_args.quantization"
        )
    return {"quantization": "bitsandbytes"}
