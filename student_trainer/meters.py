"""When a trainer's numbers change: hooks into stages, rollouts and teacher calls. metrics_server.py has the numbers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from protos.errors import TeacherError, reason_of
from protos.scores import Mode

from .teacher_client.tracing import Tracer

if TYPE_CHECKING:
    from .metrics_server import Metrics

NOT_VALUES = frozenset({"epoch", "completion_tokens", "total_flos", "train_loss"})
"""Numbers of a line of metrics that are none of `trainer_value`, beside seconds and measurements."""


class StageMeter(TrainerCallback):  # type: ignore[misc]
    """Counts what one stage's training does: its steps one by one, all else with each line of metrics."""

    def __init__(self, metrics: Metrics, stage: str) -> None:
        self._metrics, self._labels = metrics, (metrics.run, stage)
        self._logged = 0
        self._ended = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The stage begins, or goes on from a checkpoint."""
        self._logged, self._ended = state.global_step, time.monotonic()
        self._metrics.training.labels(*self._labels).set(1)
        self._metrics.steps.labels(*self._labels).set(state.max_steps)
        self._metrics.step.labels(*self._labels).set(state.global_step)
        self._metrics.step_seconds.labels(*self._labels).set(0)
        self._metrics.step_time.labels(*self._labels).set_to_current_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step is done."""
        now = time.monotonic()
        self._metrics.step.labels(*self._labels).set(state.global_step)
        self._metrics.step_seconds.labels(*self._labels).set(now - self._ended)
        self._metrics.step_time.labels(*self._labels).set_to_current_time()
        self._ended = now

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """A line of metrics, or a measurement, whose names begin with eval_."""
        numbers = {k: float(v) for k, v in (logs or {}).items() if isinstance(v, int | float)}
        for name, value in numbers.items():
            if name.startswith("eval_"):
                self._metrics.measured.labels(*self._labels, name.removeprefix("eval_")).set(value)
        if "loss" not in numbers:
            return
        steps, self._logged = state.global_step - self._logged, state.global_step
        self._metrics.completion_tokens.labels(*self._labels).inc(numbers.get("completion_tokens", 0) * steps)
        for name, value in numbers.items():
            if name.startswith("seconds_"):
                part = name.removeprefix("seconds_")
                self._metrics.seconds.labels(*self._labels, part).inc(max(value, 0) * steps)
            elif not name.startswith("eval_") and name not in NOT_VALUES:
                self._metrics.value.labels(*self._labels, name).set(value)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The stage has ended."""
        self.close()

    def close(self) -> None:
        """The stage trains no more, also after an error."""
        self._metrics.training.labels(*self._labels).set(0)


class RolloutMeter:
    """Counts what a stage samples, and how old it is when it trains."""

    def __init__(self, metrics: Metrics | None) -> None:
        self._metrics = metrics
        self._done: int | None = None
        self._sampled: dict[int, int] = {}

    def ended(self, mode: Mode, tokens: int, seconds: float) -> None:
        """A completion has ended, after `seconds` of waiting for the engine since the one before."""
        if self._metrics is not None:
            self._metrics.rollouts.labels(self._metrics.run, mode.value).inc()
            self._metrics.rollout_tokens.labels(self._metrics.run, mode.value).inc(tokens)
            self._metrics.rollout_seconds.labels(self._metrics.run).inc(seconds)

    def announced(self, step: int, restored: bool) -> None:
        """The rollouts of `step` are there: sampled with the present weights, or `restored` from a checkpoint."""
        if self._done is None:
            self._done = step  # the step that comes next is the first to be announced
        if not restored:
            self._sampled[step] = self._done

    def taken(self, step: int, ahead: int) -> None:
        """The rollouts of `step` train; those of a checkpoint count as `ahead` steps old, or as old as the run."""
        age = step - self._sampled.pop(step, max(0, step - ahead))
        self._done = step + 1
        if self._metrics is not None:
            self._metrics.staleness.labels(self._metrics.run).set(age)


class CallMeter:
    """A tracer that counts and times each call before `inner` makes a span of it."""

    def __init__(self, metrics: Metrics, inner: Tracer) -> None:
        self._metrics, self._inner = metrics, inner

    @contextmanager
    def span(self, name: str, attributes: Mapping[str, Any]) -> Iterator[None]:
        """See Tracer."""
        run, method = self._metrics.run, name.removeprefix("teacher.")
        began, outcome = time.monotonic(), "OTHER"
        try:
            with self._inner.span(name, attributes):
                yield
            outcome = "OK"
            if method == "score":
                self._metrics.scored_tokens.labels(run).inc(attributes["tokens"])
        except TeacherError as error:
            outcome = reason_of(type(error))
            raise
        finally:
            self._metrics.calls.labels(run, method, outcome).inc()
            self._metrics.call_seconds.labels(run, method).observe(time.monotonic() - began)
