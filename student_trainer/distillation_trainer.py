"""The one `transformers.Trainer` of both stages: it trains on what a stage's `Feed` hands it and leaves the rest to
transformers.

Four hooks are overridden. `get_batch_samples` announces optimizer steps to the feed ahead of the one that it takes, so
that a stage can sample, or ask the teacher, early. `compute_loss` runs the loss inside the wrapped model's forward (DDP
and FSDP synchronise as ever) and divides its sum by the completion tokens of the global batch: all processes, all
accumulation steps. `evaluate` measures with the stage's evaluator and keeps the best model. `_get_grad_norm` refuses a
gradient that is no number. Saving is saving.py.

Gradient scale: DDP and FSDP average gradients over W processes, so each sum is multiplied by W / N. N is counted
here, before the first micro-batch trains; the Trainer divides by nothing of its own where it gets a count.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from .batches import GroupedSampler, completion_tokens, first_tokens
from .checkpoints import Layout
from .errors import UserError
from .evaluation import Measurement
from .feed import Feed, MicroBatch
from .packing import forward_inputs, packs
from .saving import SavingTrainer
from .schedule import Schedule
from .stage_loss import COLUMNS, StageLoss
from .stopping import Stopper


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
        complete: Callable[[Path], None] = lambda folder: None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.feed, self.loss, self._evaluator = feed, loss, evaluator
        self._announced = 0
        self._weighed = False
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
            complete=complete,
            data_collator=list,
            train_dataset=_Indices(len(feed)),
            eval_dataset=_Indices(1),
            processing_class=tokenizer,
            callbacks=list(callbacks),
        )
        self.remove_callback(PrinterCallback)

        self._schedule = Schedule(
            feed.lengths(),
            batch_size=args.train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            rank=args.process_index,
            world=args.world_size,
            seed=args.seed,
            packed=packs(self.model),
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> GroupedSampler:
        return self._schedule.sampler()

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[int]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, MicroBatch]], torch.Tensor]:
        """The micro-batches of one optimizer step, and the completion tokens of the global batch."""
        self.stopper.check()
        if self.state.global_step >= self.state.max_steps:  # gone on from the checkpoint of the last step
            self.control.should_training_stop = True
            return [], torch.tensor(0.0, device=device)
        given = sorted(chain.from_iterable(islice(epoch_iterator, num_batches)))
        started = time.monotonic()
        if not self._announced:
            self._since = started
        number = self.state.global_step
        step = self._schedule.step(number)
        if given != sorted(chain.from_iterable(step.micro_batches)) or num_batches != len(step.micro_batches):
            raise UserError(
                f"step {number} of the data loader has other examples than the stage's schedule",
                "training.extra",
                "leave the data loader's settings (accelerator_config, dataloader_*, ignore_data_skip) alone",
            )
        for ahead in range(max(self._announced, number), min(number + self.feed.ahead + 1, self.state.max_steps)):
            self.feed.announce(self._schedule.step(ahead))
            self._announced = ahead + 1
        batches = self.feed.take(step)
        self._seconds["sampling"] += time.monotonic() - started
        tokens = torch.tensor(float(sum(completion_tokens(b.rows) for b in batches)), device=device)
        tokens = self.accelerator.reduce(tokens, "sum")
        self._tokens += float(tokens)
        self._steps += 1
        self._losses, self._names = [], []
        return [{"batch": batch} for batch in batches], tokens

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
        scores = batch.scores()
        self._seconds["teacher"] += time.monotonic() - started
        targets = batch.targets(scores).to(device)
        placed = forward_inputs(self.model, batch.rows, self.processing_class.pad_token_id, device)
        loss, sums = model(**placed, objective=self.loss.on(targets, *self._rollouts(batch, device)))
        self._held += placed["input_ids"].numel()
        self._filled += sum(len(r.ids) for r in batch.rows)
        self._add(sums, completion_tokens(batch.rows))
        self._losses.append(loss.detach())
        self._names.append(_named([r.name for r in batch.rows]))
        if self.accelerator.gradient_state.sync_gradients:
            self._refuse_non_finite()
        scaled: torch.Tensor = loss * (self.args.world_size / num_items_in_batch)
        return scaled

    def _rollouts(self, batch: MicroBatch, device: torch.device) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """float32[N] the sampler's log-probabilities and bool[N] the first tokens, where the loss weighs by them."""
        if batch.rollout_logprobs is None:
            return None, None
        begins = torch.from_numpy(first_tokens(batch.rows)) if batch.begins is None else batch.begins
        return batch.rollout_logprobs.to(device), begins.to(device)

    def _add(self, sums: torch.Tensor, tokens: int) -> None:
        """Adds a micro-batch to the sums of COLUMNS; tokens that are not weighed have the weight 1."""
        if len(sums) == len(COLUMNS):
            self._weighed = True
        else:
            sums = torch.cat([sums, sums.new_full((1,), tokens)])
        self._sums = sums if self._sums is None else self._sums + sums

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
            named = dict(zip(COLUMNS, means.tolist(), strict=True))
            named.pop("loss")
            if not self._weighed:
                named.pop("importance_weight")
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

    def save_feed(self, folder: Path) -> None:
        """Adds what the feed has under way."""
        self.feed.save(folder, self.state.global_step)

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
