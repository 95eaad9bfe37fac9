"""The one `transformers.Trainer` of both stages: it trains on what a stage's `Feed` hands it and leaves the rest to
transformers.

Four hooks are overridden. `get_batch_samples` asks the feed for the micro-batches of a whole optimizer step, so that
a stage can sample, or ask the teacher ahead. `compute_loss` runs the loss inside the wrapped model's forward (DDP and
FSDP synchronise as ever) and divides its sum by the completion tokens of the global batch: all processes, all
accumulation steps. `evaluate` measures with the stage's evaluator and keeps the best model. `_get_grad_norm` refuses a
gradient that is no number. Saving is saving.py.

Gradient scale: DDP and FSDP average gradients over W processes, so each sum is multiplied by W / N. N is counted
here, before the first micro-batch trains; the Trainer divides by nothing of its own where it gets a count.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import torch
from torch.utils.data import Dataset
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from .batches import GroupedSampler, Row, completion_tokens, cut
from .checkpoints import Layout
from .errors import UserError
from .evaluation import Measurement
from .losses import Targets
from .packing import forward_inputs, packs
from .saving import SavingTrainer
from .stage_loss import METRICS, StageLoss
from .stopping import Stopper


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Sequences that train in one forward pass.

    `targets` waits for the teacher and gives the targets of the completion tokens in the order of `rows`;
    `rollout_logprobs` float32[N] are the sampler's, where the loss weighs by them.
    """

    rows: Sequence[Row]
    targets: Callable[[], Targets]
    rollout_logprobs: torch.Tensor | None = None


class Feed(Protocol):
    """What a stage trains on. Indices are those of the stage's examples, in 0..len-1."""

    ahead: int
    """Optimizer steps whose micro-batches are announced before they are asked for."""

    def __len__(self) -> int: ...

    def lengths(self) -> Sequence[int]:
        """Tokens of each example, by which a global batch is sorted, and each process's share cut into
        micro-batches.
        """
        ...

    def announce(self, indices: Sequence[int]) -> None:
        """A micro-batch that will be asked for soon."""
        ...

    def step(self, micro_batches: Sequence[Sequence[int]], step: int, epoch: int) -> list[MicroBatch]:
        """As many micro-batches as were given, for optimizer step `step` (0 is the first)."""
        ...


class _Indices(Dataset[int]):
    """0..n-1: the Trainer only carries indices, the feed knows what they are."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> int:
        return index


class MeasureEveryEpochs(TrainerCallback):  # type: ignore[misc]
    """Asks for a measurement after every `epochs` epochs; 0 never asks."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Asks at the end of an epoch whose turn it is."""
        if self.epochs and round(state.epoch) % self.epochs == 0:
            control.should_evaluate = True


class DistillationTrainer(SavingTrainer):
    """See the module. `evaluator` measures the model; `about` is what a model folder's training_config.json says."""

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        feed: Feed,
        loss: StageLoss,
        *,
        layout: Layout,
        tokenizer: Any,
        evaluator: Callable[[Any], Measurement | None],
        about: Callable[[int, dict[str, float]], dict[str, Any]],
        save_total_limit: int | None,
        stopper: Stopper | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.feed, self.loss, self._evaluator = feed, loss, evaluator
        self._iterator: Iterator[list[int]] | None = None
        self._queue: deque[list[list[int]]] = deque()
        self._lengths = feed.lengths()
        self._losses: list[torch.Tensor] = []
        self._names: list[str] = []
        self._sums: torch.Tensor | None = None
        self._tokens, self._steps = 0.0, 0
        self._held = self._filled = 0
        self._seconds = {"sampling": 0.0, "teacher": 0.0, "saving": 0.0}
        self._since = time.monotonic()
        self.last_measurement: Measurement | None = None
        self._measured_step = -1
        super().__init__(
            model,
            args,
            layout=layout,
            about=about,
            save_total_limit=save_total_limit,
            stopper=stopper,
            data_collator=list,
            train_dataset=_Indices(len(feed)),
            eval_dataset=_Indices(1),
            processing_class=tokenizer,
            callbacks=list(callbacks),
        )
        self.remove_callback(PrinterCallback)

    def _get_train_sampler(self, train_dataset: Any = None) -> GroupedSampler:
        group = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return GroupedSampler(self._lengths, group, self.args.seed)

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[int]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, MicroBatch]], torch.Tensor]:
        """The micro-batches of one optimizer step, and the completion tokens of the global batch."""
        self.stopper.check()
        if epoch_iterator is not self._iterator:
            self._iterator = epoch_iterator
            self._queue.clear()
        while len(self._queue) <= self.feed.ahead:
            equal = list(islice(epoch_iterator, self.args.gradient_accumulation_steps))
            if not equal:
                break
            self._queue.append(self._cut(equal))
            for indices in self._queue[-1]:
                self.feed.announce(indices)
        started = time.monotonic()
        groups = self._queue.popleft() if self._queue else []
        assert len(groups) == num_batches, "a step's micro-batches are not those that the Trainer counts"
        batches = self.feed.step(groups, self.state.global_step, int(self.state.epoch or 0)) if groups else []
        self._seconds["sampling"] += time.monotonic() - started
        tokens = torch.tensor(float(sum(completion_tokens(b.rows) for b in batches)), device=device)
        tokens = self.accelerator.reduce(tokens, "sum")
        self._tokens += float(tokens)
        self._steps += 1
        self._losses, self._names = [], []
        return [{"batch": batch} for batch in batches], tokens

    def _cut(self, equal: list[list[int]]) -> list[list[int]]:
        """One process's micro-batches of a step, anew, with less padding or more evenly filled; as many as before."""
        rows = [i for indices in equal for i in indices]
        groups = cut([self._lengths[i] for i in rows], len(equal), packed=packs(self.model))
        return [[rows[place] for place in group] for group in groups]

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, MicroBatch],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """This micro-batch's part of the global batch's mean loss, times the number of processes."""
        assert num_items_in_batch is not None, "the loss is normalised by the tokens of the global batch"
        batch, device = inputs["batch"], self.args.device
        started = time.monotonic()
        targets = batch.targets().to(device)
        self._seconds["teacher"] += time.monotonic() - started
        placed = forward_inputs(self.model, batch.rows, self.processing_class.pad_token_id, device)
        loss, sums = model(**placed, objective=self.loss.on(targets, _to(batch.rollout_logprobs, device)))
        self._held += placed["input_ids"].numel()
        self._filled += sum(len(r.ids) for r in batch.rows)
        self._sums = sums if self._sums is None else self._sums + sums
        self._losses.append(loss.detach())
        self._names.append(_named([r.name for r in batch.rows]))
        if self.accelerator.gradient_state.sync_gradients:
            self._refuse_non_finite()
        scaled: torch.Tensor = loss * (self.args.world_size / num_items_in_batch)
        return scaled

    def _refuse_non_finite(self) -> None:
        """Stops before the optimizer step where a micro-batch of it has a loss that is no number."""
        losses = torch.stack(self._losses)
        if not bool(losses.isfinite().all()):
            bad = [(v, n) for v, n in zip(losses.tolist(), self._names, strict=True) if not math.isfinite(v)]
            raise self._not_finite("loss", bad[0][0], [name for _, name in bad])

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if not bool(torch.as_tensor(norm).isfinite().all()):
            raise self._not_finite("gradient", float(norm), self._names)
        return norm

    def _not_finite(self, what: str, value: float, names: Sequence[str]) -> UserError:
        last = self.layout.newest_whole(contents=False)
        saved = f"{last} is whole, go on from it with --resume" if last else "there is no checkpoint yet"
        return UserError(
            f"the {what} of step {self.state.global_step + 1} is not finite ({value}), in the batch of "
            f"{'; '.join(names)}",
            "training",
            f"lower the learning rate or use float32 (models.torch_dtype); no weight was changed by this step, {saved}",
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the stage's metrics, means since the last line, to what the Trainer logs after a step."""
        if "loss" in logs and self._sums is not None:
            means = self.accelerator.reduce(self._sums, "sum") / max(self._tokens, 1.0)
            named = dict(zip(METRICS, means.tolist(), strict=True))
            named.pop("loss")
            if self.loss.objective.beta == 0:
                named.pop("cross_entropy")
            steps, elapsed = max(self._steps, 1), time.monotonic() - self._since
            spent = {f"seconds_{k}": v / steps for k, v in self._seconds.items()}
            logs |= named | spent | {"seconds_training": elapsed / steps - sum(spent.values())}
            held, filled = self._over_all(self._held, self._filled)
            logs["padding_share"] = 1 - filled / max(held, 1.0)
            busy = elapsed - self._seconds["saving"]
            logs |= {"completion_tokens": self._tokens / steps, "tokens_per_second": self._tokens / busy}
            self._reset_clock()
        super().log(logs, start_time)

    def _over_all(self, *counts: float) -> list[float]:
        """Each number's sum over all processes."""
        total = self.accelerator.reduce(torch.tensor(counts, device=self.args.device), "sum")
        found: list[float] = total.tolist()
        return found

    def _reset_clock(self) -> None:
        self._sums, self._tokens, self._steps = None, 0.0, 0
        self._held = self._filled = 0
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        self._since = time.monotonic()

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measures the model; one with a smaller validation loss than all before becomes the best model."""
        started = time.monotonic()
        measurement = self._evaluator(self.model)
        self._since += time.monotonic() - started
        self.last_measurement, self._measured_step = measurement, self.state.global_step
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in measurement.values.items()} if measurement else {}
        if measurement and metrics:
            texts: dict[str, Any] = {
                f"{metric_key_prefix}_sample_{i}": "\n\n".join(s) for i, s in enumerate(measurement.samples)
            }
            self.log({**metrics, **texts})
            loss, best = metrics[f"{metric_key_prefix}_loss"], self.state.best_metric
            better = best is None or loss < best
            if better and self.save_to(self.layout.best_model, measurement.values, must=False):
                self.state.best_metric, self.state.best_global_step = loss, self.state.global_step
        handler = self.callback_handler
        self.control = handler.on_evaluate(self.args, self.state, self.control, metrics)  # type: ignore[has-type]
        return metrics

    @property
    def measured_now(self) -> bool:
        """Whether the weights are those that were measured last."""
        return bool(self._measured_step == self.state.global_step)

    @property
    def unlogged_saving(self) -> float:
        """Seconds spent on saving since the last line of metrics."""
        return self._seconds["saving"]

    def measured(self) -> dict[str, float]:
        """What was measured last."""
        return self.last_measurement.values if self.last_measurement else {}

    def spent_saving(self, seconds: float) -> None:
        """Counts the time of a save."""
        self._seconds["saving"] += seconds


def _named(names: Sequence[str], shown: int = 8) -> str:
    """The examples of a micro-batch, for a message."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _to(tensor: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(device)
