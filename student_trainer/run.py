"""One run from configuration to final table: students, data, teacher, handshake, stages.

It decides what happens in which order and leaves every step to its module.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import set_seed

from protos.scores import Mode, Prompt, Sampling, ScoreSpec, Sequence

from . import distributed, embedded_teacher, full_distribution, handshake, off_policy, on_policy
from .checkpoints import Layout, is_finished, off_policy_layout, on_policy_layout, read_about, recover
from .config import Config
from .data import load_examples
from .evaluation import Evaluator, Student, answer_text
from .model_card import check_push, push
from .models import describe
from .modes import render
from .report import RunReport
from .reporting import Reporter, check_reports, final_table, logging_to
from .rollouts import sample
from .settings import to_yaml
from .stage import Outcome, Session, open_student, report, training_device
from .stage_loss import StageLoss
from .teacher_client import TeacherClient, connect
from .verifiers import load_verifier

log = logging.getLogger(__name__)

STAGES = {"non_policy": "stage 1, off-policy", "policy": "stage 2, on-policy"}
"""What people read for a layout's stage."""


def run(config: Config, stage: str, pretrained_student: str | Path | None, console: Console) -> None:
    """Does `stage` (all, non_policy, policy or test) as configured; every user's mistake is an error that `explain`
    knows.
    """
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
        source = first_student(config, stage, pretrained_student)
        description = describe(config, source)
        verifier = load_verifier(config.evaluation.verifier)
        train, validation = load_examples(config.data, config.training.seed)
        log.info("%d examples to train on, %d held out", len(train), len(validation))
        client = open_teacher(config, reporter, stack)
        info = client.teacher()
        log.info("teacher %s (%s, %s), fingerprint %s", info.name, info.engine, info.dtype, info.fingerprint)
        handshake.check(
            info, description.tokenizer, description.logits_width, config, eos_ids=description.eos_ids, stage=stage
        )
        if stage == "test":
            try_both(config, client, source, train[0].messages)
            return
        head = full_distribution.fetch(config, client, training_device()) if config.wants_full(stage) else None
        evaluator = Evaluator(config, client, info, description.tokenizer, validation, verifier, reporter, head)
        stack.callback(evaluator.close)
        record = RunReport(config, stage, info, sys.orig_argv, main)
        session = Session(config, client, info, train, evaluator, reporter, config.training.resume, record, head)
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
    student = open_student(config, source, session.info.vocab_size)
    first = "policy" if stage == "policy" else "non_policy"
    size, head = session.info.normalized_size, session.teacher_head
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
        record.add_stage(f"{STAGES['non_policy']} (an earlier run)", earlier.root, temperature)
    if stage in ("all", "non_policy"):
        layout = off_policy_layout(config.training.output_dir)
        outcome = run_stage(session, layout, off_policy.distil, lambda: student)
        rows.append({"model": "after stage 1", **outcome.measured, "seconds": outcome.seconds})
    if stage in ("all", "policy"):
        layout = on_policy_layout(config.training.output_dir)
        if stage == "all":
            best = outcome.best_model
            outcome = run_stage(
                session, layout, on_policy.distil, lambda: open_student(config, best, session.info.vocab_size)
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
    session.record.begin_stage(STAGES[layout.stage], layout.root, options.temperature)
    if distributed.on_main(lambda: is_finished(layout, session.resume)):
        log.info("%s is finished, going on after it", layout.root)
        return Outcome(layout.best_model, read_about(layout.best_model).get("measured", {}), None)
    outcome = distil(session, student())
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


def open_teacher(config: Config, reporter: Reporter, stack: ExitStack) -> TeacherClient:
    """A client of the configured teacher, or of one that rank 0 starts for this run; closed with `stack`."""
    address = config.teacher.endpoint
    on_wait: Callable[[str], None] = reporter.waiting

    def start_one() -> str:
        nonlocal on_wait
        embedded = stack.enter_context(embedded_teacher.start(config, reporter.waiting))
        on_wait = embedded.watching(reporter.waiting)  # a teacher of our own that has died is not waited for
        return embedded.grpc

    if address is None:  # only rank 0 runs the function, so only rank 0 owns the server; the others get its address
        address = distributed.on_main(start_one)
    client = connect(
        address,
        timeout_s=config.teacher.timeout_s,
        patience_s=config.teacher.patience_s,
        max_in_flight=config.teacher.max_in_flight,
        name=f"trainer-{Path(config.training.output_dir).name}-{distributed.rank()}",
        on_wait=on_wait,
    )
    stack.callback(client.close)
    return client


def try_both(config: Config, client: TeacherClient, source: str | Path, messages: Any) -> None:
    """Stage `test`: one score and one answer of the teacher and one of the student in each mode, shown."""
    info = client.teacher()
    student = open_student(config, source, info.vocab_size)
    limit = min(config.evaluation.max_new_tokens, 128)
    ids = render(student.tokenizer, messages, Mode.NON_THINKING)
    scores = client.score([Sequence(ids, 1)], ScoreSpec(min(4, info.limits.top_k)))[0]
    assert scores.token_logprobs is not None
    log.info("the teacher scored %d tokens, %.3f nats a token", scores.positions, scores.token_logprobs.mean())
    for mode in info.modes:
        prompt = render(student.tokenizer, messages, mode)
        own = sample(student.model, [prompt], max_new_tokens=limit, temperature=0.0, **student.sampling)[0]
        log.info("student, %s: %r", mode.value, answer_text(student.tokenizer, own))
        if info.can_generate:
            found = client.generate([Prompt(token_ids=prompt, mode=mode)], Sampling(limit, temperature=0.0))[0][0]
            log.info("teacher, %s: %r", mode.value, found.text)
    log.info("both models are loaded and fit together")


def notes(session: Session) -> list[str]:
    """What the numbers of the table were measured on."""
    evaluator = session.evaluator
    problems = len(evaluator.requests) // max(len(session.info.modes), 1)
    if not problems:
        return ["nothing is held out (data.val_ratio is 0), so nothing was measured"]
    top_k = evaluator.plain.top_k
    support = f"on the teacher's top {top_k} and the tail" if top_k else "exact, over the whole vocabulary"
    return [
        f"Accuracy over {problems} held-out problems in each mode; divergences in nats a token at temperature 1 over "
        f"{len(evaluator.rows)} of the teacher's answers, {support}."
    ]
