"""What the live page, `top` and `GET /status` show: one frozen picture of a server, in plain numbers.

It knows nothing of how they come about. Rates are tokens per second over the last RATE_S seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

RATE_S = 10.0
"""Seconds over which rates are taken."""
HISTORY_STEP_S, HISTORY_STEPS = 5.0, 120
"""Seconds between two points of the history, and how many are kept."""


@dataclass(frozen=True)
class Rates:
    """Tokens per second: scored by the engine, sampled, and of sequences that were known or joined another."""

    scored: float = 0.0
    generated: float = 0.0
    cached: float = 0.0


@dataclass(frozen=True)
class Latency:
    """Seconds of the last calls of a kind, and how many those were; None where there were none."""

    calls: int
    p50: float | None
    p90: float | None
    p99: float | None


@dataclass(frozen=True)
class ClientStatus:
    """One client: calls in progress, tokens of it that wait, what it gets, and how it fares."""

    name: str
    label: str
    transport: str
    in_flight: int
    waiting_tokens: int
    calls: int
    failed: int
    idle_s: float
    """Seconds since its last call began or ended."""
    rates: Rates
    known_share: float | None
    """Of all tokens that it ever had scored, those that cost the engine nothing; None where there were none."""
    score: Latency
    generate: Latency


@dataclass(frozen=True)
class ErrorStatus:
    """One call that failed; `detail` is "" where it could hold something of the call."""

    at: float
    """Seconds since the epoch."""
    client: str
    method: str
    transport: str
    reason: str
    detail: str
    request_id: str


@dataclass(frozen=True)
class StepStatus:
    """The engine's last steps of a kind: how many, and their means."""

    steps: int
    sequences: float
    tokens: float
    seconds: float
    readout_share: float
    """Part of the seconds in which scores were read out of hidden states."""


@dataclass(frozen=True)
class Status:
    """See the module."""

    now: float
    """Seconds since the epoch."""
    up_s: float
    state: str
    """ready, loading, shutting down, or why the teacher is not ready."""
    ready: bool
    name: str
    engine: str
    dtype: str
    quantization: str
    fingerprint: str
    restarts: int
    last_step_s: float | None
    """Seconds since the engine ended a step; None where it has not ended any."""
    steps: dict[str, StepStatus]
    rates: Rates
    history: list[Rates]
    """The rates of the last minutes, one each HISTORY_STEP_S seconds, oldest first."""
    queue_tokens: int
    queue_tokens_limit: int
    queue_sequences: int
    queue_sequences_limit: int
    submitted_tokens: dict[str, int]
    """Tokens that the engine holds, by lane."""
    sequences: dict[str, int]
    """Scored sequences since the start, by where their scores came from: memory, disk, joined, engine."""
    cache_bytes: int
    cache_limit: int
    disk_bytes: int
    disk_limit: int
    latency: dict[str, Latency]
    clients: list[ClientStatus]
    errors: list[ErrorStatus]
    """The last ones, newest first."""
