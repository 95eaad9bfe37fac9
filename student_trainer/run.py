"""One run from configuration to final table: students, data, teacher, handshake, stages.

It decides what happens in which order and leaves every step to its module.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import set_seed

from . import distributed, mixture, off_policy, on_policy, parallel
from .checkpoints import Layout, is_finished, off_policy_layout, on_policy_layout, read_about, recover
from .config import STAGE_NAMES, Config
from .data import load_examples
from .evaluation import Evaluator, Student
from .meters import CallMeter
from .model_card import check_push, push
from .models import describe
from .modes import prompt_tokens
from .opening import open_teachers
from .rejection import verifier_of
from .report import RunReport
from .reporting import Reporter, check_reports, final_table, logging_to, open_metrics
from .settings import to_yaml
from .stage import Outcome, Session, open_student, report, training_device
from .stage_loss import StageLoss
from .teacher_client.tracing import NO_TRACER
from .traces import open_tracer
from .trial import too_long, try_both
from .verifiers import load_verifier

log = logging.getLogger(__name__)


def run(config: Config, stage: str, pretrained_student: str | Path | None, console: Console) -> None:
    """Does `stage` (all, non_policy, policy or test) as configured; every user's mistake is an error that `explain`
    knows.
    """
    parallel.prepare_environment()
    distributed.start()
    with ExitStack() as stack:
        stack.callback(distributed.stop)
        main = distributed.is_main()
        stack.enter_context(logging_to(config.training.log_file, console, main))
        reporter = Reporter(console, main=main)
        log.debug("stage %s with\n%s", stage, to_yaml(config))
        set_seed(config.training.seed)
        if stage != "test":
            check_reports(config.training)
        repository = config.training.push_to_hub if stage != "test" else None
        if repository is not None:
            distributed.on_main(lambda: check_push(repository))
        mixture.check(config, stage)
        source = first_student(config, stage, pretrained_student)
        description = describe(config, source)
        if stage != "test" and (problem := too_long(config, description.positions)):
            log.warning("%s", problem)
        verifier = load_verifier(config.evaluation.verifier)
        if stage != "test":
            verifier_of(config)
        train, validation = load_examples(
            config.data, config.training.seed, partial(prompt_tokens, description.tokenizer)
        )
        log.info("%d examples to train on, %d held out", len(train), len(validation))
        domains = {e.domain for e in [*train, *validation]}
        tracer = None
        if config.training.traces_endpoint is not None:
            tracer = open_tracer(config.training.traces_endpoint, config.training.output_dir, stack)
        metrics = open_metrics(config.training, stack) if main and stage != "test" else None
        calls = CallMeter(metrics, tracer or NO_TRACER) if metrics is not None else tracer or NO_TRACER
        teachers = open_teachers(config, stage, description, domains, reporter, training_device, stack, calls)
        if metrics is not None:
            metrics.about(str(source), [t.info for t in teachers.all])
            metrics.watch(lambda: [server for t in teachers.all for server in t.client.replicas()])
        if stage == "test":
            try_both(config, teachers, source, train[0], verifier, console)
            return
        evaluator = Evaluator(config, teachers, description.tokenizer, validation, verifier, reporter)
        stack.callback(evaluator.close)
        record = RunReport(config, stage, teachers.by_scope(), sys.orig_argv, main)
        session = Session(config, teachers, train, evaluator, reporter, config.training.resume, record, tracer, metrics)
        with record.kept():
            rows = run_stages(session, stage, source)
            if main:
                final_table(console, rows, Path(config.training.output_dir), record.notes)
        if repository is not None and main:
            layout = off_policy_layout if stage == "non_policy" else on_policy_layout
            push(layout(config.training.output_dir).final_model, repository)


def run_stages(session: Session, stage: str, source: str | Path) -> list[dict[str, Any]]:
    """Measures teacher and student, trains, and gives the rows of the final table."""
    config, evaluator, record = session.config, session.evaluator, session.record
    rows = record.rows
    record.notes += notes(session)
    rows.append({"model": "teacher", **evaluator.teacher().values})
    student = open_student(config, source, session.teachers.vocab_size)
    first = "policy" if stage == "policy" else "non_policy"
    size, head = session.teachers.normalized_size, session.teachers.head
    if first == "policy":
        loss = StageLoss.on_policy(config.policy_distillation, size, head)
    else:
        loss = StageLoss.off_policy(config.non_policy_distillation, size, head)
    before = evaluator.student(student, loss, on_policy=first == "policy")
    label = "student before" if first == "non_policy" else f"student {source}"
    if before is not None:
        report(label, before)
        record.before = before.samples
    rows.append({"model": label, **(before.values if before else {})})
    record.write()
    earlier = off_policy_layout(config.training.output_dir)
    if first == "policy" and Path(source) == earlier.best_model:
        temperature = config.non_policy_distillation.temperature
        record.add_stage(f"{STAGE_NAMES['non_policy']} (an earlier run)", earlier.root, temperature)
    if stage in ("all", "non_policy"):
        layout = off_policy_layout(config.training.output_dir)
        outcome = run_stage(session, layout, off_policy.distil, lambda: student)
        rows.append({"model": "after stage 1", **outcome.measured, "seconds": outcome.seconds})
    if stage in ("all", "policy"):
        layout = on_policy_layout(config.training.output_dir)
        if stage == "all":
            best = outcome.best_model
            student.engine.close()
            outcome = run_stage(
                session, layout, on_policy.distil, lambda: open_student(config, best, session.teachers.vocab_size)
            )
        else:
            outcome = run_stage(session, layout, on_policy.distil, lambda: student)
        rows.append({"model": "after stage 2", **outcome.measured, "seconds": outcome.seconds})
    return rows


def run_stage(
    session: Session, layout: Layout, distil: Callable[[Session, Student], Outcome], student: Callable[[], Student]
) -> Outcome:
    """Runs a stage, or takes its result where the run goes on and the stage had finished."""
    options = (
        session.config.non_policy_distillation if layout.stage == "non_policy" else session.config.policy_distillation
    )
    session.record.begin_stage(STAGE_NAMES[layout.stage], layout.root, options.temperature)
    if distributed.on_main(lambda: is_finished(layout, session.resume)):
        log.info("%s is finished, going on after it", layout.root)
        return Outcome(layout.best_model, read_about(layout.best_model).get("measured", {}), None)
    chosen = student()
    try:
        outcome = distil(session, chosen)
    finally:
        chosen.engine.close()
    log.info("%s: best model in %s, final model in %s", layout.stage, layout.best_model, layout.final_model)
    return outcome


def first_student(config: Config, stage: str, pretrained: str | Path | None) -> str | Path:
    """The student to start from: the one named, or for stage 2 alone stage 1's best, or the configured one."""
    layout = off_policy_layout(config.training.output_dir)
    if stage == "policy":
        distributed.on_main(lambda: recover(layout))  # a run that was killed may have left the best model half-replaced
    best = layout.best_model
    if pretrained is None and stage == "policy" and best.is_dir():
        log.info("starting from %s, stage 1's best model", best)
        return best
    return pretrained or config.models.student_model


def notes(session: Session) -> list[str]:
    """What the numbers of the table were measured on."""
    evaluator = session.evaluator
    problems = len({r.example_id for r in evaluator.requests})
    if not problems:
        return ["nothing is held out (data.val_ratio is 0), so nothing was measured"]
    top_k = evaluator.plain.top_k
    support = f"on the teacher's top {top_k} and the tail" if top_k else "exact, over the whole vocabulary"
    return [
        f"Accuracy over {problems} held-out problems in each mode; divergences in nats a token at temperature 1 over "
        f"{len(evaluator.rows)} of the teacher's answers, {support}."
    ]
