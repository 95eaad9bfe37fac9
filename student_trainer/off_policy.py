"""Stage 1, off-policy: the student learns from the teacher's own responses, in both modes.

The teacher answers every training prompt once; the answers are a dataset that stays. Each of its sequences is scored
once (once an epoch for whole distributions, which are too large to keep), ahead of the step that needs it, and the
student minimises

    alpha * soft(T) + beta * cross-entropy

on the completion tokens. Knows no transport and no training loop.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from protos.scores import Sampling

from . import distributed
from .batches import Row, completion_ids
from .checkpoints import Layout, off_policy_layout
from .config import STAGE_NAMES, Config
from .data import Example
from .evaluation import Student, requests_for, response_row
from .feed import MicroBatch
from .modes import pair_with_modes
from .rejection import accepted
from .responses import Request, Response, collect, fitting, read, reuse
from .row_scores import RowScores
from .schedule import Step
from .score_store import Wait
from .stage import Outcome, Session, begin, train
from .stage_loss import StageLoss

log = logging.getLogger(__name__)

AHEAD_STEPS, AHEAD_ROWS = 2, 128
"""How far ahead scores are asked for: so many optimizer steps at least, and as many as have so many rows, unless these
are hidden states.
"""


def distil(session: Session, student: Student) -> Outcome:
    """Trains `student` on the teacher's responses."""
    started, options = time.monotonic(), session.config.non_policy_distillation
    layout = off_policy_layout(session.config.training.output_dir)
    checkpoint = begin(session, layout)
    responses = teacher_responses(session, layout, student.tokenizer)
    loss = StageLoss.off_policy(options, session.teachers.normalized_size, session.teachers.head)
    store = RowScores(session.teachers, loss.spec, layout.root / "scores", distributed.rank())
    step_rows = options.batch_size * options.gradient_accumulation_steps
    feed = ResponseFeed(responses, store, loss, step_rows)
    try:
        measured = train(session, layout, options, student, feed, loss, checkpoint, STAGE_NAMES["non_policy"])
    finally:
        store.close()
    return Outcome(layout.best_model, measured, time.monotonic() - started)


def teacher_responses(session: Session, layout: Layout, tokenizer: Any) -> list[Response]:
    """The teacher's responses to the training prompts: reused, or asked for and kept in responses.parquet."""
    options, max_length = session.config.non_policy_distillation, session.config.data.max_length
    path = layout.root / "responses.parquet"
    if options.dataset_path is not None:
        path, allowed = Path(options.dataset_path), options.allow_other_teacher
        domains = {e.id: e.domain for e in session.train}
        responses = reuse(path, session.teachers, domains, other_teacher=allowed)
    else:
        distributed.on_main(lambda: ask(session, path, tokenizer))
        responses, _ = read(path)
    fits, left_out = fitting(responses, max_length)
    kept = accepted(session.config, responses, fits, path, ours=options.dataset_path is None)
    tokens = sum(len(r.completion_ids) for r in kept)
    log.info("%d responses of the teacher, %d completion tokens", len(kept), tokens)
    if left_out:
        log.warning(
            "left out %d responses that are empty or longer than data.max_length = %d tokens", left_out, max_length
        )
    # The parts hold them as they arrived, which is a matter of timing; equal seeds must train in an equal order.
    return sorted(kept, key=lambda r: (r.example_id, r.mode.value, r.sample))


def wanted(config: Config, train: Sequence[Example], tokenizer: Any) -> tuple[list[Request], Sampling]:
    """What to ask the teacher about training examples, and how it is to sample."""
    options, seed = config.non_policy_distillation, config.training.seed
    pairs = pair_with_modes(train[: options.max_prompts], options.modes, options.thinking_prob, seed)
    requests = requests_for(tokenizer, pairs, config.data.max_length)
    return requests, Sampling(options.max_new_tokens, options.response_temperature, options.response_top_p, seed=seed)


def ask(session: Session, path: Path, tokenizer: Any) -> None:
    """Asks the teacher for every response that `path` does not hold yet."""
    options = session.config.non_policy_distillation
    requests, sampling = wanted(session.config, session.train, tokenizer)
    total = len(requests) * options.samples_per_prompt
    started = time.monotonic()
    with session.reporter.progress("teacher answers training prompts", total) as update:
        collect(
            session.teachers,
            requests,
            sampling,
            path,
            samples=options.samples_per_prompt,
            progress=lambda done, _, tokens: update(done, f"{tokens} tokens"),
        )
    log.info("asked the teacher for %d responses in %.0f s: %s", total, time.monotonic() - started, path)


class ResponseFeed:
    """Micro-batches of responses with their scores, asked for `ahead` optimizer steps early, one call for each step."""

    def __init__(self, responses: Sequence[Response], store: RowScores, loss: StageLoss, step_rows: int) -> None:
        """`step_rows` is the number of responses of an optimizer step."""
        self.rows = [response_row(r) for r in responses]
        self.store, self.loss = store, loss
        self.ahead = AHEAD_STEPS if loss.teacher else max(AHEAD_STEPS, -(-AHEAD_ROWS // step_rows))
        self._waits: dict[int, Wait] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def lengths(self) -> list[int]:
        """Tokens of each response with its prompt."""
        return [len(row.ids) for row in self.rows]

    def announce(self, step: Step) -> None:
        """Asks the teacher for what is not known yet."""
        self._waits[step.number] = self.store.request([self.rows[i] for m in step.micro_batches for i in m])

    def take(self, step: Step) -> list[MicroBatch]:
        """The micro-batches of an announced step."""
        wait, first, found = cache(self._waits.pop(step.number)), 0, []
        for indices in step.micro_batches:
            found.append(self._batch([self.rows[i] for i in indices], wait, first))
            first += len(indices)
        return found

    def _batch(self, rows: list[Row], wait: Wait, first: int) -> MicroBatch:
        tokens, temperatures = completion_ids(rows), self.store.spec.temperatures
        return MicroBatch(
            rows,
            lambda: wait()[first : first + len(rows)],
            lambda scores: self.loss.targets(tokens, scores, temperatures),
        )

    def save(self, folder: Path, step: int) -> None:
        """Keeps the scores that have arrived; a run that goes on asks for the others again."""
        self.store.keep()

    def restore(self, folder: Path) -> None:
        """Nothing: what was kept is in the store."""
