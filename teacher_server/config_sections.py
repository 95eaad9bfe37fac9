"""Sections of the server's configuration: who may connect, how much they may send, what is kept."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """What all sections share: frozen, no unknown keys, documented fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class TlsConfig(Section):
    """TLS of both transports; files in PEM, read again when they change."""

    cert_file: str | None = None
    """The server's certificate and what leads to its authority; unset serves without TLS."""
    key_file: str | None = None
    """The certificate's private key."""
    client_ca_file: str | None = None
    """Authorities whose client certificates are accepted; set, whoever has none is refused before any call."""
    ends_in_front: bool = False
    """TLS ends at a proxy in front: listen without it on an address that other machines reach, given that there are
    keys."""

    @model_validator(mode="after")
    def _whole(self) -> TlsConfig:
        if (self.cert_file is None) != (self.key_file is None):
            missing = "tls.key_file" if self.key_file is None else "tls.cert_file"
            raise ValueError(f"{missing} is missing; TLS needs the certificate and its key")
        if self.client_ca_file is not None and self.cert_file is None:
            raise ValueError("tls.client_ca_file needs tls.cert_file and tls.key_file")
        return self


class CacheConfig(Section):
    """Which scores are kept, for all clients."""

    enabled: bool = True
    """Keep scores, and let equal sequences in flight be computed once."""
    memory_mib: int = Field(default=1024, ge=0)
    """Memory for kept scores in MiB."""
    folder: str | None = None
    """Folder on a local disk that keeps scores too, also from one start to the next; unset keeps none on a disk."""
    disk_mib: int = Field(default=65536, ge=0)
    """Room for scores in cache.folder in MiB; those least recently used make room for others."""


class LimitsConfig(Section):
    """How much one call, one connection and one address may take; what is over a limit is refused with its numbers."""

    sequences: int = Field(default=4096, ge=1)
    """Sequences of a Score call; prompts times n of a Generate call."""
    request_tokens: int = Field(default=262_144, ge=1)
    """Tokens of all sequences or prompts of a call; at least those of the longest sequence."""
    top_k: int = Field(default=1024, ge=1)
    """K, the alternatives at a position; at most the vocabulary."""
    candidates: int = Field(default=1024, ge=1)
    """C, the candidates at a position; at most the vocabulary."""
    temperatures: int = Field(default=8, ge=1)
    """Temperatures of a Score call."""
    json_mib: int = Field(default=4, ge=1)
    """Largest HTTP body of JSON in MiB, which is for people; the contract's messages may have max_request_mib."""
    json_numbers: int = Field(default=1_000_000, ge=1)
    """Numbers of a JSON answer of /v1/score, and log-probabilities of one of OpenAI's routes."""
    reading_mib: int = Field(default=1024, ge=1)
    """Bytes of calls that are being received, all together, in MiB; beyond it calls are Overloaded."""
    head_kib: int = Field(default=32, ge=1, le=1024)
    """Largest head of an HTTP request, or metadata of a gRPC call, in KiB."""
    head_s: float = Field(default=10.0, gt=0)
    """Seconds in which an HTTP head, or a TLS or gRPC handshake, must be complete."""
    body_s: float = Field(default=20.0, gt=0)
    """Seconds in which a call's body must be complete, beside the time that body_kib_per_s gives for what came."""
    body_kib_per_s: float = Field(default=64.0, gt=0)
    """KiB of a body for which another second is given."""
    stall_s: float = Field(default=60.0, gt=0)
    """Seconds for which an HTTP client may leave its answer unread; then the connection is cut."""
    connections: int = Field(default=4096, ge=1)
    """Connections of each transport."""
    connections_per_address: int = Field(default=512, ge=1)
    """HTTP connections of one address; behind a proxy all come from the proxy's."""
    streams: int = Field(default=256, ge=1)
    """Calls at the same time on one gRPC connection."""


class WatchConfig(Section):
    """When a loaded engine is taken for hung."""

    step_s: float = Field(default=600.0, gt=0)
    """Seconds in which an engine that has work must finish a step; else it is started again. A step is a batch of
    batch_tokens, which takes minutes where weights are on a CPU."""
    canary_s: float = Field(default=60.0, gt=0)
    """Seconds without an answer of the engine after which it is asked for a score of two tokens; after twice as many
    the server is not ready."""
    start_s: float = Field(default=7200.0, gt=0)
    """Seconds that an engine's start may take, reading the weights included."""


class TracesConfig(Section):
    """OpenTelemetry traces; they need `strong2weak[otel]`."""

    endpoint: str | None = None
    """Where spans go by OTLP over HTTP, such as http://localhost:4318/v1/traces; unset, nothing is traced."""
    ratio: float = Field(default=1.0, ge=0, le=1)
    """Share of the calls without a trace of their own that begin one; those with one are traced as it says."""
