"""OpenTelemetry spans of a run where they are configured: one for each optimizer step, its teacher calls below it.

OpenTelemetry is imported when the first tracer is made. Calls that are sent ahead belong to the step that sent them.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from transformers import TrainerCallback

from .errors import UserError
from .teacher_client.tracing import TRACEPARENT

SERVICE = "strong2weak-trainer"


def open_tracer(endpoint: str, run: str, stack: ExitStack) -> OtelTracer:
    """A tracer that is closed with `stack`; UserError where OpenTelemetry is not installed."""
    try:
        tracer = OtelTracer(endpoint, run)
    except ImportError as error:
        raise UserError(
            f"spans are to go to {endpoint}, and OpenTelemetry is not installed ({error})",
            "training.traces_endpoint",
            "pip install 'strong2weak[otel]', or unset it",
        ) from error
    stack.callback(tracer.close)
    return tracer


class OtelTracer:
    """A `tracing.Tracer`; `processor` gets the spans, by default one that sends them by OTLP to `endpoint`."""

    def __init__(self, endpoint: str, run: str, processor: Any = None) -> None:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import IdGenerator, TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        class Ids(IdGenerator):  # type: ignore[misc]
            """OpenTelemetry's own ids come from Python's generator, of which a seeded run has every number counted."""

            def generate_span_id(self) -> int:
                return secrets.randbits(64) or 1

            def generate_trace_id(self) -> int:
                return secrets.randbits(128) or 1

        self._trace = trace
        resource = Resource.create({SERVICE_NAME: SERVICE, "run": run})
        self._provider = TracerProvider(resource=resource, id_generator=Ids())
        self._provider.add_span_processor(processor or BatchSpanProcessor(OTLPSpanExporter(endpoint)))
        self._tracer = self._provider.get_tracer(SERVICE)
        self._step: Any = None

    @contextmanager
    def span(self, name: str, attributes: Mapping[str, Any]) -> Iterator[None]:
        """See Tracer; below the present span, else below the step that goes on."""
        parent = None
        if self._step is not None and not self._trace.get_current_span().get_span_context().is_valid:
            parent = self._trace.set_span_in_context(self._step)
        kind = self._trace.SpanKind.CLIENT
        with self._tracer.start_as_current_span(name, parent, kind, attributes=dict(attributes)) as span:
            own = span.get_span_context()
            token = TRACEPARENT.set(f"00-{own.trace_id:032x}-{own.span_id:016x}-{int(own.trace_flags):02x}")
            try:
                yield
            finally:
                TRACEPARENT.reset(token)

    def begin_step(self, stage: str, number: int) -> None:
        """Ends the step that goes on, and begins another one."""
        self.end_step()
        self._step = self._tracer.start_span("step", attributes={"stage": stage, "step": number})

    def end_step(self) -> None:
        """Ends the step that goes on, if any does."""
        if self._step is not None:
            self._step.end()
            self._step = None

    def close(self) -> None:
        """Sends what has not been sent yet."""
        self.end_step()
        self._provider.shutdown()


class StepSpans(TrainerCallback):  # type: ignore[misc]
    """Keeps a tracer's step equal to the trainer's: each lasts from the end of the one before to its own."""

    def __init__(self, tracer: OtelTracer, stage: str) -> None:
        self._tracer, self._stage = tracer, stage

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """transformers'."""
        self._tracer.begin_step(self._stage, state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """transformers'."""
        if state.global_step < state.max_steps:
            self._tracer.begin_step(self._stage, state.global_step + 1)
        else:
            self._tracer.end_step()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """transformers'."""
        self._tracer.end_step()
