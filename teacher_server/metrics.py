"""Numbers for Prometheus, in a registry of this server's own; it knows what is counted, not where."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Metrics:
    """All metrics of one server."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.requests = Counter(
            "teacher_requests",
            "Calls that ended, by method, transport and outcome (OK, CANCELLED or the error's reason).",
            ["method", "transport", "outcome"],
            registry=registry,
        )
        self.refused = Counter(
            "teacher_refused",
            "Calls and connections refused before they were read, by transport and reason.",
            ["transport", "reason"],
            registry=registry,
        )
        self.in_flight = Gauge("teacher_in_flight", "Calls in progress, by method.", ["method"], registry=registry)
        self.scored_tokens = Counter(
            "teacher_scored_tokens", "Tokens of sequences that the engine scored.", registry=registry
        )
        self.cached_tokens = Counter(
            "teacher_cached_tokens", "Tokens of sequences answered from the cache.", registry=registry
        )
        self.disk_tokens = Counter(
            "teacher_disk_tokens", "Tokens of these whose scores were read from the disk.", registry=registry
        )
        self.joined_tokens = Counter(
            "teacher_joined_tokens", "Tokens of sequences that joined an equal one in flight.", registry=registry
        )
        self.prompt_tokens = Counter(
            "teacher_prompt_tokens", "Tokens of prompts given to the engine, by mode.", ["mode"], registry=registry
        )
        self.generated_tokens = Counter(
            "teacher_generated_tokens", "Tokens of completions that were sampled, by mode.", ["mode"], registry=registry
        )
        self.queue_tokens = Gauge("teacher_queue_tokens", "Tokens of admitted work not finished.", registry=registry)
        self.queue_sequences = Gauge(
            "teacher_queue_sequences", "Admitted sequences and prompts not finished.", registry=registry
        )
        self.submitted_tokens = Gauge(
            "teacher_submitted_tokens", "Tokens that the engine holds now, by lane.", ["lane"], registry=registry
        )
        self.cache_bytes = Gauge("teacher_cache_bytes", "Bytes of scores in the cache.", registry=registry)
        self.disk_bytes = Gauge("teacher_disk_bytes", "Bytes of scores on the disk.", registry=registry)
        self.hidden_bytes = Gauge(
            "teacher_hidden_bytes", "Bytes reserved for hidden states that clients have not read.", registry=registry
        )
        self.request_seconds = Histogram(
            "teacher_request_seconds", "Seconds from a call to its end.", ["method"], buckets=SECONDS, registry=registry
        )
        self.engine_restarts = Counter(
            "teacher_engine_restarts", "Times that a dead engine was started again.", registry=registry
        )
        self.queue_seconds = Histogram(
            "teacher_queue_seconds",
            "Seconds that a sequence or prompt waited for its turn.",
            ["lane"],
            buckets=SECONDS,
            registry=registry,
        )
        for method in ("score", "generate", "head"):  # a metric that is there from the start can be alerted on
            self.in_flight.labels(method)
            self.request_seconds.labels(method)
        for lane in ("score", "generate"):
            self.queue_seconds.labels(lane)

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
