"""The server's configuration: one frozen model, from the command line over TEACHER_* over a YAML file over defaults.

It imports no engine and no web framework, so that `--help` answers at once; `settings.py` reads the sources.
"""

from __future__ import annotations

import ipaddress
from dataclasses import fields
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from teacher_server.backends.options import (
    Attention,
    BackendName,
    BackendOptions,
    DeviceName,
    DtypeName,
    Quantization,
    RestartPolicy,
)
from teacher_server.config_sections import CacheConfig, LimitsConfig, TlsConfig, TracesConfig, WatchConfig


class VllmConfig(BaseModel):
    """Settings of the vLLM backend alone."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    engine_args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of vLLM's engine as they are, such as {"tensor_parallel_size": 8}; unknown ones are refused."""


class RestartConfig(BaseModel):
    """What happens when the engine dies."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    attempts: int = Field(default=3, ge=0)
    """Times in restart.window_s that a dead engine is started again; at the next the server ends with code 1."""
    window_s: float = Field(default=600.0, gt=0)
    """Seconds in which the restarts count."""
    backoff_s: float = Field(default=1.0, ge=0, le=30)
    """Seconds before the first restart; each other one in the window waits twice as long, up to 30."""


class ServerConfig(BaseModel):
    """All settings of one teacher server."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())

    model: str
    """The teacher: a folder with a checkpoint, or a hub id such as Qwen/Qwen3-235B-A22B."""
    name: str = ""
    """Name that clients see; empty means the model's, or that of its folder alone where it is a path."""
    backend: BackendName = "transformers"
    """Engine: transformers, vllm, or theoretical (answers known by theory, for tests)."""
    dtype: DtypeName = "auto"
    """Data type of the computation; auto is the checkpoint's own on a GPU and float32 on a CPU."""
    quantization: Quantization = "none"
    """Quantise the weights while loading (bitsandbytes)."""
    device: DeviceName = "auto"
    """Where the model runs; auto takes a GPU where there is one."""
    attn_implementation: Attention = "auto"
    """Attention kernel; auto takes FlashAttention 2 where it is installed and can run, else SDPA."""
    trust_remote_code: bool = False
    """Run Python code that a checkpoint brings along."""
    max_sequence_tokens: int | None = Field(default=None, ge=2)
    """Longest sequence, or prompt and completion together, in tokens; unset means the model's own limit."""
    batch_tokens: int | None = Field(default=None, ge=1)
    """Tokens of one engine step; unset means the engine's default."""
    vllm: VllmConfig = VllmConfig()
    """The vLLM backend's own settings."""
    restart: RestartConfig = RestartConfig()
    """What happens when the engine dies."""
    watch: WatchConfig = WatchConfig()
    """When a loaded engine is taken for hung."""
    host: str = "127.0.0.1"
    """Address to listen on, for both ports."""
    grpc_port: int = Field(default=50051, ge=0, le=65535)
    """Port of gRPC; 0 takes a free one."""
    http_port: int = Field(default=8000, ge=0, le=65535)
    """Port of HTTP; 0 takes a free one."""
    keys_file: str | None = None
    """File with the hashes of clients' keys (`python -m teacher_server keys`); unset, whoever reaches the teacher may
    use it."""
    tls: TlsConfig = TlsConfig()
    """TLS of both transports."""
    limits: LimitsConfig = LimitsConfig()
    """How much one call, one connection and one address may take."""
    allow_insecure_bind: bool = False
    """Listen on an address that other machines reach although keys or TLS are missing: without keys anyone there may
    use the teacher, without TLS anyone on the way reads keys and text."""
    queue_tokens: int = Field(default=4_000_000, ge=1)
    """Tokens of admitted, unfinished work above which calls are refused with Overloaded."""
    queue_sequences: int = Field(default=16_384, ge=1)
    """Admitted, unfinished sequences and prompts above which calls are refused with Overloaded."""
    cache: CacheConfig = CacheConfig()
    """Which scores are kept, for all clients."""
    hidden_mib: int = Field(default=4096, ge=1)
    """Memory for hidden states that clients have not read yet, in MiB; a call that alone needs more is refused."""
    max_message_mib: int = Field(default=64, ge=1, le=2047)
    """Largest single gRPC message that is received, in MiB."""
    max_request_mib: int = Field(default=256, ge=1)
    """Largest call, all its messages together, or HTTP body, in MiB."""
    grace_s: float = Field(default=60.0, ge=0)
    """Seconds that calls in progress get to end after SIGTERM or SIGINT."""
    ready_file: str | None = None
    """File to write once calls are answered: one JSON object with the addresses and the process id."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """What goes to the log on standard error."""
    log_format: Literal["plain", "json"] = "plain"
    """Lines for people, or one JSON object a line, with the fields of each call."""
    traces: TracesConfig = TracesConfig()
    """OpenTelemetry traces of calls."""

    @model_validator(mode="after")
    def _refuse_an_open_door(self) -> ServerConfig:
        if not self.allow_insecure_bind and not is_loopback(self.host):
            reached = f"host {self.host} can be reached from other machines, and without"
            if self.keys_file is None:
                raise ValueError(
                    f"{reached} keys anyone who reaches it may use this teacher; give --keys-file, listen on "
                    "127.0.0.1, or say --allow-insecure-bind if you trust that whole network"
                )
            if self.tls.cert_file is None and not self.tls.ends_in_front:
                raise ValueError(
                    f"{reached} TLS anyone on the way reads the keys; give --tls-cert-file and --tls-key-file, say "
                    "--tls-ends-in-front where a proxy does it, or --allow-insecure-bind if you trust that network"
                )
        return self

    def backend_options(self) -> BackendOptions:
        """The engine's share of the settings."""
        shared = [field.name for field in fields(BackendOptions) if field.name in type(self).model_fields]
        chosen: dict[str, Any] = {name: getattr(self, name) for name in shared}
        chosen["vllm_engine_args"] = self.vllm.engine_args
        for name in ("top_k", "candidates", "request_tokens", "sequences", "temperatures"):
            chosen[f"max_{name}"] = getattr(self.limits, name)
        return BackendOptions(**{name: value for name, value in chosen.items() if value is not None})

    def restart_policy(self) -> RestartPolicy:
        """When a dead engine is started again."""
        return RestartPolicy(**self.restart.model_dump())


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`; a name other than localhost may be anywhere."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
