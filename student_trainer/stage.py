"""What both stages share: the session of a run, and training a student on a feed from the first step to its final
model.

Knows the Trainer's arguments; a stage knows what it trains on and with which loss.
"""

from __future__ import annotations

import difflib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments

from . import distributed, packing, parallel, reporting
from .checkpoints import Layout, prepare, read_about
from .config import Config, NonPolicyDistillation, PolicyDistillation
from .data import Example
from .distillation_trainer import DistillationTrainer, MeasureEveryEpochs
from .errors import Interrupted, UserError
from .evaluation import Evaluator, Measurement, Student
from .feed import Feed
from .history import History
from .meters import StageMeter
from .models import complete_model, eos_ids, load_student, load_tokenizer
from .objective_forward import accept_objective
from .report import RunReport
from .rollouts import open_engine
from .stage_loss import StageLoss
from .stopping import Stopper
from .teachers import Teachers
from .traces import OtelTracer, StepSpans
from .trackio_report import TrackioReport

if TYPE_CHECKING:
    from .metrics_server import Metrics

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """Everything that lives as long as a run: configuration, teachers, data, held-out problems, console."""

    config: Config
    teachers: Teachers
    train: Sequence[Example]
    evaluator: Evaluator
    reporter: reporting.Reporter
    resume: bool | str
    record: RunReport
    tracer: OtelTracer | None = None
    metrics: Metrics | None = None


@dataclass(frozen=True)
class Outcome:
    """A finished stage: its best model, what was measured on it, and the seconds that the stage took."""

    best_model: Path
    measured: dict[str, float] = field(default_factory=dict)
    seconds: float | None = None


def training_device() -> torch.device:
    """This process's device: its GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def open_student(config: Config, source: str | Path, vocab_size: int) -> Student:
    """The student of `source`, ready to train, on this process's device."""
    model = packing.set_up(accept_objective(load_student(config, source)), config.training.packing)
    tokenizer = load_tokenizer(config, source)
    if not getattr(model, "is_quantized", False):  # else it is there already
        model.to(training_device())
    ends = eos_ids(model.generation_config, tokenizer)
    engine = open_engine(config, model, vocab_size=vocab_size, eos_ids=ends, pad_id=tokenizer.pad_token_id)
    return Student(model, tokenizer, engine)


def begin(session: Session, layout: Layout) -> Path | None:
    """Makes the stage's folder ready; the checkpoint to go on from, or None for a fresh start."""
    checkpoint, aside = distributed.on_main(lambda: prepare(layout, session.resume))
    if aside is not None:
        log.info("%s is from an earlier run, moved it to %s (continue it with --resume instead)", layout.root, aside)
    if checkpoint is not None:
        session.teachers.check_same(read_about(checkpoint), {e.domain for e in session.train}, str(checkpoint))
        log.info("going on from %s", checkpoint)
    return checkpoint


def arguments(config: Config, options: NonPolicyDistillation | PolicyDistillation, layout: Layout) -> TrainingArguments:
    """The Trainer's arguments for a stage; `training.extra` is added last, unknown names are refused."""
    training = config.training
    known = {f.name for f in fields(TrainingArguments)}
    for name in training.extra:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else "see transformers.TrainingArguments"
            raise UserError("no argument of transformers.TrainingArguments", f"training.extra.{name}", hint)
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    way = parallel.chosen(training)
    values: dict[str, Any] = {
        "output_dir": str(layout.root),
        "per_device_train_batch_size": options.batch_size,
        "gradient_accumulation_steps": options.gradient_accumulation_steps,
        "num_train_epochs": options.num_epochs,
        "max_steps": options.max_steps if options.max_steps > 0 else -1,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": training.lr_scheduler_type,
        "warmup_steps": training.warmup_ratio,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "logging_steps": training.logging_steps,
        "logging_nan_inf_filter": False,
        "save_steps": training.save_steps,
        "save_total_limit": None,
        "eval_strategy": "no",
        "report_to": reporting.report_to(training),
        "run_name": layout.stage,
        "seed": training.seed,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        # Without this, accelerate takes several processes without GPUs for independent ones.
        "use_cpu": distributed.world() > 1 and not torch.cuda.is_available(),
        checkpointing: training.gradient_checkpointing and not parallel.checkpoints_itself(way),
        **parallel.arguments(training, config.models, way),
    }
    try:
        args = TrainingArguments(**{**values, **training.extra})
    except (ValueError, TypeError) as error:
        raise UserError(str(error), "training", "mend the training section") from error
    assert args.world_size == distributed.world(), "the Trainer sees another number of processes than torchrun started"
    if args.n_gpu > 1:
        args._n_gpu = 1
    return args


def warn_of_rounding(model: Any, learning_rate: float) -> None:
    """Says so where most updates are smaller than what the weights' own data type can hold.

    AdamW moves a weight by about the learning rate a step; a weight w of a type with epsilon e changes only by more
    than e |w| / 2.
    """
    weights = [p for p in model.parameters() if p.requires_grad and p.ndim == 2]
    dtype = weights[0].dtype if weights else torch.float32
    if dtype in (torch.bfloat16, torch.float16) and distributed.is_main():
        typical = float(weights[-1].detach()[:256].float().abs().mean())
        if learning_rate < torch.finfo(dtype).eps * typical / 2:
            log.warning(
                "the student is trained in %s: at a learning rate of %.0e most updates of its weights (typically %.0e) "
                "are rounded away; set models.torch_dtype=float32 and training.extra={bf16: true}, or raise the rate",
                str(dtype).removeprefix("torch."),
                learning_rate,
                typical,
            )


@parallel.no_traces()
def train(
    session: Session,
    layout: Layout,
    options: NonPolicyDistillation | PolicyDistillation,
    student: Student,
    feed: Feed,
    loss: StageLoss,
    checkpoint: Path | None,
    label: str,
) -> dict[str, float]:
    """Trains to the end, writes best and final model, and gives what was measured on the best one."""
    on_policy = isinstance(options, PolicyDistillation)
    args, stopper = arguments(session.config, options, layout), Stopper()
    if parallel.chosen(session.config.training) == "ddp" or not args.bf16:  # else float32 weights are kept beside them
        warn_of_rounding(student.model, options.learning_rate)
    progress = reporting.TrainingProgress(session.reporter, label)
    history = History(layout.root)
    callbacks: list[Any] = [
        progress,
        *([history] if distributed.is_main() else []),
        MeasureEveryEpochs(session.config.evaluation.every_epochs),
    ]
    if session.tracer is not None:
        callbacks.append(StepSpans(session.tracer, layout.stage))
    meter = StageMeter(session.metrics, layout.stage) if session.metrics is not None else None
    if meter is not None:
        callbacks.append(meter)
    if session.config.training.use_tensorboard and distributed.is_main():
        callbacks.append(reporting.tensorboard(layout.root / "runs"))
    tracker = None
    if session.config.training.use_trackio and distributed.is_main():
        name = f"{Path(session.config.training.output_dir).name}-{layout.stage}"
        project, config = session.config.training.trackio_project, session.config.model_dump(mode="json")
        tracker = TrackioReport(project, name, config, goes_on=checkpoint is not None)
        callbacks.append(tracker)

    def about(step: int, measured: dict[str, float]) -> dict[str, Any]:
        teachers, config = session.teachers.described(), session.config.model_dump(mode="json")
        return {"stage": layout.stage, "step": step, "teachers": teachers, "measured": measured, "config": config}

    def measure(model: Any) -> Measurement | None:
        found = session.evaluator.student(student, loss, on_policy=on_policy)
        if found is not None and session.reporter.main:
            report(label, found)
            history.add(trainer.state.global_step, {"samples": found.samples})
            session.record.write()
        return found

    trainer = DistillationTrainer(
        student.model,
        args,
        feed,
        loss,
        layout=layout,
        tokenizer=student.tokenizer,
        evaluator=measure,
        about=about,
        save_total_limit=session.config.training.save_total_limit,
        stopper=stopper,
        complete=lambda folder: complete_model(folder, session.config),
        callbacks=callbacks,
    )
    started = time.monotonic()
    with stopper.catching():
        try:
            if checkpoint:
                feed.restore(checkpoint)
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            if not trainer.measured_now:
                trainer.evaluate()
            stopper.check()
        except Interrupted as stop:
            raise trainer.save_and_stop(stop) from None
        finally:
            progress.close()
            if meter is not None:
                meter.close()
    log.info("%s: %d steps in %.0f s", label, trainer.state.global_step, time.monotonic() - started)
    last = trainer.last_measurement.values if trainer.last_measurement else {}
    if distributed.on_main(lambda: not layout.best_model.is_dir()):
        trainer.save_to(layout.best_model, last)
    trainer.save_to(layout.final_model, last)
    if distributed.is_main():
        history.add(trainer.state.global_step, {"saving": trainer.unlogged_saving})
    reporting.finish_reports(session.config.training)
    if tracker is not None:
        tracker.close()
    distributed.barrier()
    return dict(read_about(layout.best_model).get("measured", {}))


def report(label: str, found: Measurement) -> None:
    """One line of what was measured, and the sample outputs."""
    names = ["loss", "accuracy_thinking", "accuracy_non_thinking", "forward_kl", "reverse_kl", "own_reverse_kl"]
    rest = ["tail_share", "finished_thinking", "finished_non_thinking", "completion_tokens_thinking"]
    names += [n for n in found.values if n.startswith("accuracy_") and n not in names]
    values = [f"{n} {found.values[n]:.4g}" for n in [*names, *rest, "seconds"] if n in found.values]
    log.info("%s measured: %s", label, ", ".join(values))
    for mode, problem, answer in found.samples:
        log.info("  %s | %s -> %s", mode, " ".join(problem.split())[:120], " ".join(answer.split())[:300])
