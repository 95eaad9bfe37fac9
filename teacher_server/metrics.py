"""Numbers for Prometheus, in a registry of this server's own; it knows what is counted, not where.

Every number that belongs to a client has its name as the label `client`. Names of keys are few and are all kept; where
anybody may call themselves anything, those after the first MOST_CLIENTS share one label.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from teacher_server.backends.steps import KINDS, Step
from teacher_server.exchange import Exchange
from teacher_server.usage import OTHERS

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
CLIENT_SECONDS = (0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0, 600.0)
"""Fewer, because each client has its own."""
STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
TOKENS = (1, 4, 16, 64, 256, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536)
MOST_CLIENTS = 100


class ClientLabels:
    """The label of each client's name; at most MOST_CLIENTS of names that no key vouches for."""

    def __init__(self, most: int = MOST_CLIENTS) -> None:
        self._most = most
        self._known: set[str] = set()
        self._others: set[str] = set()

    def enter(self, name: str, known: bool) -> str:
        """The label of a client that calls; `known` where its key gave it the name."""
        if known:
            self._known.add(name)
        elif name not in self._known and len(self._others) < self._most:
            self._others.add(name)
        return self.of(name)

    def of(self, name: str) -> str:
        """The label of a client that has called."""
        return name if name in self._known or name in self._others else OTHERS


class Metrics:
    """All metrics of one server."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.clients = ClientLabels()
        registry = self.registry
        self.requests = Counter(
            "teacher_requests",
            "Calls that ended, by client, method, transport and outcome (OK, CANCELLED or the error's reason).",
            ["client", "method", "transport", "outcome"],
            registry=registry,
        )
        self.refused = Counter(
            "teacher_refused",
            "Calls and connections refused before they were read, by transport and reason.",
            ["transport", "reason"],
            registry=registry,
        )
        self.in_flight = Gauge("teacher_in_flight", "Calls in progress, by method.", ["method"], registry=registry)
        self.request_seconds = Histogram(
            "teacher_request_seconds",
            "Seconds from a call to its end, by client and method.",
            ["client", "method"],
            buckets=CLIENT_SECONDS,
            registry=registry,
        )
        self.sequences = Counter(
            "teacher_score_sequences",
            "Sequences that were answered, by client and by where their scores came from: memory or disk (the cache's "
            "tiers), joined (an equal one in flight) or engine.",
            ["client", "source"],
            registry=registry,
        )
        self.scored_tokens = Counter(
            "teacher_scored_tokens", "Tokens of sequences that the engine scored.", ["client"], registry=registry
        )
        self.cached_tokens = Counter(
            "teacher_cached_tokens",
            "Tokens of sequences answered from the cache, by client and tier (memory, disk).",
            ["client", "tier"],
            registry=registry,
        )
        self.joined_tokens = Counter(
            "teacher_joined_tokens",
            "Tokens of sequences that joined an equal one in flight.",
            ["client"],
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "teacher_prompt_tokens",
            "Tokens of prompts given to the engine, by client and mode.",
            ["client", "mode"],
            registry=registry,
        )
        self.generated_tokens = Counter(
            "teacher_generated_tokens",
            "Tokens of completions that were sampled, by client and mode.",
            ["client", "mode"],
            registry=registry,
        )
        self.queue_tokens = Gauge("teacher_queue_tokens", "Tokens of admitted work not finished.", registry=registry)
        self.queue_sequences = Gauge(
            "teacher_queue_sequences", "Admitted sequences and prompts not finished.", registry=registry
        )
        self.queue_seconds = Histogram(
            "teacher_queue_seconds",
            "Seconds that a sequence or prompt waited for its turn, by client and kind.",
            ["client", "kind"],
            buckets=CLIENT_SECONDS,
            registry=registry,
        )
        self.engine_seconds = Histogram(
            "teacher_engine_seconds",
            "Seconds that a sequence or prompt was with the engine, from its turn to its end, by client and kind.",
            ["client", "kind"],
            buckets=CLIENT_SECONDS,
            registry=registry,
        )
        self.serialisation_seconds = Counter(
            "teacher_serialisation_seconds",
            "Seconds of making objects of calls (read) and bytes of answers (write), by client, method and direction.",
            ["client", "method", "direction"],
            registry=registry,
        )
        self.submitted_tokens = Gauge(
            "teacher_submitted_tokens", "Tokens that the engine holds now, by lane.", ["lane"], registry=registry
        )
        self.batch_sequences = Histogram(
            "teacher_batch_sequences",
            "Sequences of a batch of scores, or completions of a step of generation, by kind.",
            ["kind"],
            buckets=SEQUENCES,
            registry=registry,
        )
        self.batch_tokens = Histogram(
            "teacher_batch_tokens", "Tokens of these, by kind.", ["kind"], buckets=TOKENS, registry=registry
        )
        self.batch_seconds = Histogram(
            "teacher_batch_seconds",
            "Seconds that the engine took for one of these, by kind.",
            ["kind"],
            buckets=STEP_SECONDS,
            registry=registry,
        )
        self.readout_seconds = Counter(
            "teacher_readout_seconds",
            "The part of the engine's seconds in which it read scores out of hidden states.",
            registry=registry,
        )
        self.cache_bytes = Gauge("teacher_cache_bytes", "Bytes of scores in the cache.", registry=registry)
        self.disk_bytes = Gauge("teacher_disk_bytes", "Bytes of scores on the disk.", registry=registry)
        self.hidden_bytes = Gauge(
            "teacher_hidden_bytes", "Bytes reserved for hidden states that clients have not read.", registry=registry
        )
        self.engine_restarts = Counter(
            "teacher_engine_restarts", "Times that a dead engine was started again.", registry=registry
        )
        self.ready = Gauge("teacher_ready", "Whether calls are answered: 1 or 0.", registry=registry)
        self.info = Gauge(
            "teacher_info",
            "1; its labels say which teacher this is. Over all servers scraped, those of one fingerprint are replicas.",
            ["name", "fingerprint", "engine", "dtype", "quantization"],
            registry=registry,
        )
        ProcessCollector(registry=registry)
        for method in ("score", "generate", "head"):  # a metric that is there from the start can be alerted on
            self.in_flight.labels(method)
        for kind in KINDS:
            for metric in (self.batch_sequences, self.batch_tokens, self.batch_seconds):
                metric.labels(kind)

    def observe_step(self, step: Step) -> None:
        """Counts a step of the engine; may be called in any thread."""
        self.batch_sequences.labels(step.kind).observe(step.sequences)
        self.batch_tokens.labels(step.kind).observe(step.tokens)
        self.batch_seconds.labels(step.kind).observe(step.seconds or 0.0)
        if step.readout_s:
            self.readout_seconds.inc(step.readout_s)

    def count_bytes(self, exchange: Exchange) -> None:
        """Counts what the bytes of a call cost, at its end."""
        if exchange.method:
            for direction, seconds in (("read", exchange.read_s), ("write", exchange.write_s)):
                self.serialisation_seconds.labels(exchange.client, exchange.method, direction).inc(seconds)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        data: bytes = generate_latest(self.registry)
        return data


def describe_metrics() -> list[tuple[str, str, tuple[str, ...], str]]:
    """(name as Prometheus shows it, type, labels, meaning) of every metric, for the reference page."""
    found = []
    for metric in vars(Metrics()).values():
        if isinstance(metric, (Counter, Gauge, Histogram)):
            (family,) = metric.describe()
            name = family.name + ("_total" if family.type == "counter" else "")
            found.append((name, family.type, tuple(metric._labelnames), family.documentation))
    return found
