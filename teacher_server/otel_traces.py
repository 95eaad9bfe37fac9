"""OpenTelemetry spans of calls, made as they end: the call, its time in the queue, and the engine's batches it was in.

Imported only where traces are configured. A call that names a span of its caller (W3C traceparent) belongs to that
trace, and is traced where the caller's is.
"""

from __future__ import annotations

import secrets
import time
from typing import Any

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import IdGenerator, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from teacher_server.auth import Caller
from teacher_server.exchange import TRACE_HEADER
from teacher_server.traces import CallTrace, Part

SERVICE = "strong2weak-teacher"
MOST_BATCHES = 64
"""Batches of one call that get a span."""
_TRACE_CONTEXT = TraceContextTextMapPropagator()


class Ids(IdGenerator):  # type: ignore[misc]
    """Ids that no seed decides: OpenTelemetry's own take Python's generator, and a seeded run would repeat them."""

    def generate_span_id(self) -> int:
        """OpenTelemetry's."""
        return secrets.randbits(64) or 1

    def generate_trace_id(self) -> int:
        """OpenTelemetry's."""
        return secrets.randbits(128) or 1


class OtelTraces:
    """A `traces.Traces`; `processor` gets the spans, by default one that sends them by OTLP to `endpoint`."""

    def __init__(self, endpoint: str, ratio: float = 1.0, processor: Any = None) -> None:
        self._provider = TracerProvider(
            sampler=ParentBasedTraceIdRatio(ratio),
            resource=Resource.create({SERVICE_NAME: SERVICE}),
            id_generator=Ids(),
        )
        self._provider.add_span_processor(processor or BatchSpanProcessor(OTLPSpanExporter(endpoint)))
        self._tracer = self._provider.get_tracer(SERVICE)

    def ended(self, method: str, caller: Caller, outcome: str, trace: CallTrace) -> None:
        """See Traces."""
        exchange = caller.exchange
        parent = _TRACE_CONTEXT.extract({TRACE_HEADER: exchange.traceparent}) if exchange.traceparent else Context()
        span = self._tracer.start_span(
            f"teacher {method}", parent, SpanKind.SERVER, start_time=_ns(exchange.began), record_exception=False
        )
        if span.is_recording():
            span.set_attributes(
                {
                    "client": caller.name,
                    "transport": caller.transport,
                    "request.id": caller.request_id,
                    "outcome": outcome,
                    "sequences": trace.sequences,
                    "sequences.known": trace.known,
                    "tokens": trace.tokens,
                }
            )
            if outcome != "OK":
                span.set_status(Status(StatusCode.ERROR, outcome))
            self._add_parts(set_span_in_context(span), caller, trace.parts)
        span.end(_ns(time.time()))

    def _add_parts(self, call: Context, caller: Caller, parts: list[Part]) -> None:
        if not parts:
            return
        waited = min(part.admitted_at for part in parts), max(part.turn_at for part in parts)
        self._span("queue", call, *waited, {"sequences": len(parts)})
        batches: dict[int, list[Part]] = {}
        for part in parts:
            batches.setdefault(id(part.step), []).append(part)
        for found in list(batches.values())[:MOST_BATCHES]:
            step, last = found[0].step, max(part.ended_at for part in found)
            others = sorted({part.request_id for part in found} - {caller.request_id})
            own: dict[str, Any] = {"sequences": len(found), "tokens": sum(part.tokens for part in found)}
            if others:
                own["computed.for"] = others
            if step is None:  # a prompt takes part in many steps, and some engines do not say in which
                self._span("engine", call, min(part.turn_at for part in found), last, own)
                continue
            own |= {"batch.sequences": step.sequences, "batch.tokens": step.tokens, "batch.readout_s": step.readout_s}
            end = last if step.seconds is None else max(last, step.began + step.seconds)
            self._span("engine batch", call, step.began, end, own)

    def _span(self, name: str, parent: Context, began: float, ended: float, attributes: dict[str, Any]) -> None:
        span = self._tracer.start_span(name, parent, start_time=_ns(began), attributes=attributes)
        span.end(_ns(max(began, ended)))

    def close(self) -> None:
        """See Traces."""
        self._provider.shutdown()


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
