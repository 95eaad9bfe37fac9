"""What an operator may choose about an engine; knows no command line, no file and no engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

BackendName = Literal["transformers", "vllm", "theoretical"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["none", "4bit", "8bit"]
DeviceName = Literal["auto", "cpu", "cuda"]
Attention = Literal["auto", "sdpa", "eager", "flash_attention_2"]


@dataclass(frozen=True)
class RestartPolicy:
    """An engine that dies is started again at most `attempts` times within `window_s` seconds.

    The first time after `backoff_s` seconds, which double with each other time in the window, up to 30.
    """

    attempts: int = 3
    window_s: float = 600.0
    backoff_s: float = 1.0


@dataclass(frozen=True)
class BackendOptions:
    """The choices that `factory.make_backend` takes; None leaves a number to the model and the defaults.

    `model` is a folder or a hub id, `name` what GetTeacher calls it ("": see `served_name`). `dtype` "auto" is the
    checkpoint's own on a GPU and float32 on a CPU. `batch_tokens` bounds the tokens of one scoring step and, times
    four, the tokens whose keys and values generation may keep. `vllm_engine_args` pass through to vLLM's engine.
    """

    model: str
    name: str = ""
    backend: BackendName = "transformers"
    dtype: DtypeName = "auto"
    quantization: Quantization = "none"
    device: DeviceName = "auto"
    attn_implementation: Attention = "auto"
    trust_remote_code: bool = False
    batch_tokens: int = 16384
    max_sequence_tokens: int | None = None
    max_top_k: int = 1024
    max_candidates: int = 1024
    max_request_tokens: int = 262_144
    max_sequences: int = 4096
    max_temperatures: int = 8
    vllm_engine_args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("no model was named; give a folder or a hub id")
        for name in ("batch_tokens", "max_request_tokens", "max_sequences", "max_temperatures", "max_top_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_sequence_tokens is not None and self.max_sequence_tokens < 2:
            raise ValueError(f"max_sequence_tokens must be at least 2, got {self.max_sequence_tokens}")

    @property
    def served_name(self) -> str:
        """The name that GetTeacher reports: that of a folder, where the model is a path, and not where it lies."""
        if self.name or not self.model.startswith(("/", ".", "~")):
            return self.name or self.model
        return self.model.rstrip("/").rsplit("/", 1)[-1]
