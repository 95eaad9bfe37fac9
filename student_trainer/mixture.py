"""Stage 2 on a mixture: a share `lambda` of a step's examples on the student's own completions, the others on responses
of the teacher, with one divergence for all (GKD, Agarwal et al., 2024, there with one draw for a whole batch).

Each example is drawn by seed, epoch and its id, so that a run that goes on, or has more processes, draws the same. It
combines any feed of rollouts with stored responses, row by row, and knows nothing of how either is made.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch

from protos.scores import Mode, Scores

from . import distributed, packing
from .batches import Row, completion_ids, cut
from .checkpoints import Layout, off_policy_layout
from .config import Config
from .data import Example
from .errors import UserError
from .evaluation import Student, response_row
from .feed import Feed, MicroBatch
from .modes import assign_modes, unit_interval
from .off_policy import AHEAD_STEPS
from .rejection import accepted
from .responses import Response, fitting, reuse
from .row_scores import RowScores
from .schedule import Step
from .score_store import Wait
from .stage import Session
from .stage_loss import StageLoss

log = logging.getLogger(__name__)


class Rollouts(Feed, Protocol):
    """A feed of the student's own completions, of one for each of its examples."""

    examples: list[Example]
    student: Student


@contextmanager
def mixed(session: Session, layout: Layout, rollouts: Rollouts, loss: StageLoss) -> Iterator[Feed]:
    """What stage 2 trains on: `rollouts` themselves at lambda 1, else a mixture, whose scores are kept in `layout`."""
    share = session.config.policy_distillation.on_policy_share
    if share == 1:
        yield rollouts
        return
    scores = RowScores(session.teachers, loss.spec, layout.root / "scores", distributed.rank())
    try:
        yield MixedFeed(session.config, rollouts, responses_for(session), scores, loss)
    finally:
        scores.close()


def path_of(config: Config) -> Path:
    """Where the responses are: the dataset that stage 1 was given, or the one that it asked for."""
    named = config.non_policy_distillation.dataset_path
    return off_policy_layout(config.training.output_dir).root / "responses.parquet" if named is None else Path(named)


def check(config: Config, stage: str) -> None:
    """UserError where stage 2 alone is to train on responses and there are none."""
    share, path = config.policy_distillation.on_policy_share, path_of(config)
    if stage == "policy" and share < 1 and not path.exists():
        raise UserError(
            f"lambda {share:g} trains on the teacher's responses too, and there are none at {path}",
            "policy_distillation.lambda",
            "run stage 1 before (--stage all), name some with non_policy_distillation.dataset_path, or set it to 1",
        )


def responses_for(session: Session) -> list[Response]:
    """The teachers' responses that fit, in an order that does not depend on how they arrived."""
    options, path = session.config.non_policy_distillation, path_of(session.config)
    domains = {e.id: e.domain for e in session.train}
    found = reuse(path, session.teachers, domains, other_teacher=options.allow_other_teacher)
    fits, _ = fitting(found, session.config.data.max_length)
    if not fits:
        raise UserError(
            f"all {len(found)} responses are empty or longer than data.max_length", str(path), "raise data.max_length"
        )
    kept = accepted(session.config, found, fits, path, ours=options.dataset_path is None)
    return sorted(kept, key=lambda r: (r.example_id, r.mode.value, r.sample))


class MixedFeed:
    """Micro-batches of rollouts and responses; a step has the examples of the feed of rollouts, each in one of the two.

    An example without a response in its mode gets another example's; where the responses lack the mode, one of the
    other mode. Scores of responses are asked for `ahead` steps early; the rollouts are announced to their feed when
    they would be without this one, so their weights and random numbers are the same.
    """

    def __init__(
        self, config: Config, rollouts: Rollouts, responses: Sequence[Response], scores: RowScores, loss: StageLoss
    ) -> None:
        self.options, self.seed = config.policy_distillation, config.training.seed
        self.rollouts, self.scores, self.loss = rollouts, scores, loss
        self.ahead = max(AHEAD_STEPS, rollouts.ahead)
        self._waits: dict[int, Wait] = {}
        self._later: deque[Step] = deque()
        self._all = [response_row(r) for r in responses]
        self._of: dict[Mode, list[Row]] = {m: [r for r in self._all if r.mode is m] for m in Mode}
        self._own: dict[tuple[str, Mode], list[Row]] = {}
        for response, row in zip(responses, self._all, strict=True):
            self._own.setdefault((response.example_id, response.mode), []).append(row)
        ids, examples = {example_id for example_id, _ in self._own}, rollouts.examples
        text = "lambda %g: %d of %d examples have responses of their own, the others share them"
        log.info(text, self.options.on_policy_share, sum(e.id in ids for e in examples), len(examples))

    def __len__(self) -> int:
        return len(self.rollouts)

    def lengths(self) -> Sequence[int]:
        """Those of the rollouts."""
        return self.rollouts.lengths()

    def on_policy(self, index: int, epoch: int) -> bool:
        """Whether an example trains on the student's completion in this epoch."""
        text = f"lambda {self.rollouts.examples[index].id}"
        return unit_interval(self.seed + epoch, text) < self.options.on_policy_share

    def response(self, index: int, epoch: int) -> Row:
        """The response that an example trains on in this epoch, where it does not train on its own completion."""
        example, seed = self.rollouts.examples[index], self.seed + epoch
        (mode,) = assign_modes([example], self.options.thinking_prob, seed)
        rows = self._own.get((example.id, mode)) or self._of[mode] or self._all
        return rows[int(unit_interval(seed, f"response {example.id}") * len(rows))]

    def announce(self, step: Step) -> None:
        """Asks for the scores of the step's responses that are not known yet."""
        rows = self._responses(step)
        if rows:
            self._waits[step.number] = cache(self.scores.request(rows))
        self._later.append(step)

    def take(self, step: Step) -> list[MicroBatch]:
        """As many micro-batches as the step has, each of sequences of similar length, short first."""
        while self._later and self._later[0].number <= step.number + self.rollouts.ahead:
            later = self._later.popleft()
            if self.options.on_policy_share > 0:  # also a step without: sharded processes sample together
                self.rollouts.announce(self._own_part(later))
        own, rows, parts = self._own_part(step), self._responses(step), len(step.micro_batches)
        sampled = self.rollouts.take(own) if own.micro_batches else []
        if not rows:
            return sampled
        wait = self._waits.pop(step.number)
        lines = [line for batch in sampled for line in _lines(batch)]
        lines += [_Line(row, partial(_at, wait, i), None) for i, row in enumerate(rows)]
        groups = cut([len(line.row.ids) for line in lines], parts, packed=packing.packs(self.rollouts.student.model))
        return [self._batch([lines[i] for i in group]) for group in reversed(groups)]

    def save(self, folder: Path, step: int) -> None:
        """Writes the rollouts under way, and keeps the scores that have arrived."""
        self.rollouts.save(folder, step)
        self.scores.keep()

    def restore(self, folder: Path) -> None:
        """Takes up the rollouts that were under way."""
        self.rollouts.restore(folder)

    def _own_part(self, step: Step) -> Step:
        """The step's examples that are to be sampled, in as many micro-batches as it has, or one for each."""
        own = [i for m in step.micro_batches for i in m if self.on_policy(i, step.epoch)]
        parts = np.array_split(own, min(len(own), len(step.micro_batches))) if own else []
        return Step(step.number, step.epoch, tuple(tuple(part.tolist()) for part in parts))

    def _responses(self, step: Step) -> list[Row]:
        """What the step's other examples train on."""
        indices = [i for m in step.micro_batches for i in m if not self.on_policy(i, step.epoch)]
        return [self.response(i, step.epoch) for i in indices]

    def _batch(self, lines: Sequence[_Line]) -> MicroBatch:
        rows, temperatures = [line.row for line in lines], self.loss.spec.temperatures
        tokens = completion_ids(rows)
        drawn, begins = None, None
        if any(line.logprobs is not None for line in lines):
            drawn = torch.cat([_or_zeros(line) for line in lines])
            begins = torch.cat([_begins(line) for line in lines])
        return MicroBatch(
            rows,
            lambda: [line.score() for line in lines],
            lambda scores: self.loss.targets(tokens, scores, temperatures),
            drawn,
            begins,
        )


class _Line(NamedTuple):
    """One row of a micro-batch, how to wait for its score, float32[R] the sampler's log-probabilities where weighed."""

    row: Row
    score: Callable[[], Scores]
    logprobs: torch.Tensor | None


def _lines(batch: MicroBatch) -> Iterator[_Line]:
    """The rows of a micro-batch, whose scores are waited for together and once."""
    wait, first = cache(batch.scores), 0
    for i, row in enumerate(batch.rows):
        last = first + len(row.ids) - row.start
        drawn = None if batch.rollout_logprobs is None else batch.rollout_logprobs[first:last]
        yield _Line(row, partial(_at, wait, i), drawn)
        first = last


def _at(wait: Callable[[], Sequence[Scores]], i: int) -> Scores:
    return wait()[i]


def _or_zeros(line: _Line) -> torch.Tensor:
    return torch.zeros(len(line.row.ids) - line.row.start) if line.logprobs is None else line.logprobs


def _begins(line: _Line) -> torch.Tensor:
    """bool[R]: the first token of a rollout, all of a response, whose prefixes no student has sampled: weight 1."""
    begins = torch.full((len(line.row.ids) - line.row.start,), line.logprobs is None)
    begins[:1] = True
    return begins
