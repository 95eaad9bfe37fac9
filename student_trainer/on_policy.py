"""Stage 2, on-policy: the student samples, the teacher scores those very tokens, and the student minimises a
divergence on them.

One optimizer step: draw prompts and their modes, sample one completion for each, send them to the teacher, a few at a
time as they end, and train on the first micro-batch as soon as its scores are there, while the teacher scores the
others. With `max_staleness` N the rollouts of step s + N are sampled before step s trains, so that their scores arrive
meanwhile, and importance weights make up for what N steps changed. The default is the reverse KL over the teacher's top
K and the tail. Knows no transport and no training loop.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from protos.scores import Ids, Mode, Scores, ids_array

from . import distributed, in_flight, packing
from .batches import Row, completion_ids, cut
from .checkpoints import on_policy_layout
from .config import STAGE_NAMES, Config
from .data import Example
from .errors import UserError
from .evaluation import Student, requests_for, rollout_row
from .feed import MicroBatch
from .in_flight import Asked, Flight
from .losses import Head, Targets, student_top_k
from .meters import RolloutMeter
from .mixture import mixed
from .modes import assign_modes
from .packing import forward_inputs
from .responses import Request
from .rollouts import Rollout
from .schedule import Step
from .sharding import whole
from .stage import Outcome, Session, begin, train
from .stage_loss import StageLoss
from .teachers import Teachers

log = logging.getLogger(__name__)


def distil(session: Session, student: Student) -> Outcome:
    """Trains `student` on its own completions, and at a lambda below 1 on the teacher's responses beside them."""
    started, options = time.monotonic(), session.config.policy_distillation
    layout = on_policy_layout(session.config.training.output_dir)
    checkpoint = begin(session, layout)
    loss = StageLoss.on_policy(options, session.teachers.normalized_size, session.teachers.head)
    meter = RolloutMeter(session.metrics)
    rollouts = RolloutFeed(session.config, session.train, student, session.teachers, loss, meter)
    with mixed(session, layout, rollouts, loss) as feed:
        measured = train(session, layout, options, student, feed, loss, checkpoint, STAGE_NAMES["policy"])
    return Outcome(layout.best_model, measured, time.monotonic() - started)


class RolloutFeed:
    """Micro-batches of rollouts of the present student, or of one that is `ahead` optimizer steps older."""

    def __init__(
        self,
        config: Config,
        examples: Sequence[Example],
        student: Student,
        teachers: Teachers,
        loss: StageLoss,
        meter: RolloutMeter | None = None,
    ) -> None:
        self._meter = meter or RolloutMeter(None)
        self.config, self.options = config, config.policy_distillation
        self.student, self.teachers, self.loss = student, teachers, loss
        self.ahead = self.options.max_staleness
        self._flights: dict[int, Flight] = {}
        tokenizer, max_length = student.tokenizer, config.data.max_length
        both = requests_for(tokenizer, [(e, mode) for e in examples for mode in Mode], max_length)
        self._requests = {(r.example_id, r.mode): r for r in both}
        self.examples = [e for e in examples if all((e.id, mode) in self._requests for mode in Mode)]
        if not self.examples:
            raise UserError("every prompt is longer than data.max_length", "data.max_length", "raise it")

    def __len__(self) -> int:
        return len(self.examples)

    def lengths(self) -> list[int]:
        """All alike, because what a prompt's completion takes is not known before it is sampled."""
        return [1] * len(self.examples)

    def announce(self, step: Step) -> None:
        """Samples the step's rollouts with the present weights; each few go to the teacher as soon as they end."""
        restored = step.number in self._flights and self._flights[step.number].step == step
        self._meter.announced(step.number, restored)
        if restored:
            return
        examples = [self.examples[i] for indices in step.micro_batches for i in indices]
        modes = assign_modes(examples, self.options.thinking_prob, self.config.training.seed + step.epoch)
        requests = [self._requests[e.id, mode] for e, mode in zip(examples, modes, strict=True)]
        asked: list[Asked] = []
        with whole(self.student.model):
            rollouts = self._sample(requests, step.number)
            while few := list(islice(rollouts, self.options.batch_size)):
                asked += self._ask(few)
        self._flights[step.number] = Flight(step, asked)

    def take(self, step: Step) -> list[MicroBatch]:
        """As many micro-batches as the step has, each of rollouts of similar length, short first."""
        for earlier in [number for number in self._flights if number < step.number]:
            del self._flights[earlier]
        self._meter.taken(step.number, self.ahead)
        asked = self._flights[step.number].asked
        lengths = [len(a.row.ids) for a in asked]
        parts = cut(lengths, len(step.micro_batches), packed=packing.packs(self.student.model))
        return [self._batch([asked[i] for i in part]) for part in reversed(parts)]

    def save(self, folder: Path, step: int) -> None:
        """Writes the rollouts of this process that have not trained when `step` steps are done."""
        self._flights = self._held_by_all({n: f for n, f in self._flights.items() if n >= step})
        if self._flights:
            in_flight.save(folder / self._file, list(self._flights.values()), self._about)

    def restore(self, folder: Path) -> None:
        """Takes up what `save` wrote; without it, or with other settings, the rollouts are sampled anew."""
        path, flights = folder / self._file, None
        if path.is_file():
            ask = partial(self.teachers.submit_score, spec=self.loss.spec)
            flights = in_flight.load(path, self._about, lambda rows, ids: ask(rows, candidates=ids))
            if flights is None:
                log.warning("the rollouts of %s are of other settings, they are sampled anew", path)
        self._flights = self._held_by_all({f.step.number: f for f in flights or ()})

    def _held_by_all(self, flights: dict[int, Flight]) -> dict[int, Flight]:
        """Those of `flights` that every process has: the others are sampled, which is done together."""
        common = set.intersection(*map(set, distributed.gather(list(flights))))
        return {number: flights[number] for number in sorted(common)}

    @property
    def _file(self) -> str:
        return f"in_flight-{distributed.rank()}.safetensors"

    @property
    def _about(self) -> str:
        """What rollouts and scores depend on, beside weights, seed and step."""
        options = self.options
        sampled = options.sampling_temperature or options.temperature, self.weighs, distributed.world()
        engine, support = self.student.engine.name, (options.support, options.top_k)
        return f"{self.loss.spec}, {support}, {sampled}, {engine}, {self.teachers.identity}"

    def _sample(self, requests: Sequence[Request], step: int) -> Iterator[tuple[Row, Rollout]]:
        """One rollout of each request, as they end. Thinking ones begin first: the longest should not be last."""
        options = self.options
        requests = sorted(requests, key=lambda r: not r.mode.thinking)
        began = time.monotonic()
        self.student.engine.update_weights()
        for place, rollout in self.student.engine.sample(
            [r.prompt_ids for r in requests],
            max_new_tokens=options.max_new_tokens,
            temperature=options.sampling_temperature or options.temperature,
            max_length=self.config.data.max_length,
            seed=hash((self.config.training.seed, step)) % 2**63,
            logprobs=self.weighs,
            names=[r.example_id for r in requests],
        ):
            self._meter.ended(requests[place].mode, len(rollout.completion_ids), time.monotonic() - began)
            yield rollout_row(rollout, requests[place]), rollout
            began = time.monotonic()

    @property
    def weighs(self) -> bool:
        """Whether the loss weighs by how likely tokens were when sampled: by an older student, or at another
        temperature where it is of the sampled token.
        """
        other = self.options.sampling_temperature not in (None, self.options.temperature)
        return self.ahead > 0 or (other and self.loss.objective.on_sampled_token)

    def _ask(self, rollouts: Sequence[tuple[Row, Rollout]]) -> list[Asked]:
        """Sends rollouts to their teachers, with the student's own top K where the loss wants that."""
        rows = [row for row, _ in rollouts]
        candidates: list[Ids | None] = [None] * len(rows)
        if self.loss.on_student_support:
            bounds = np.cumsum([len(row.ids) - row.start for row in rows])[:-1]
            candidates = list(np.split(self._own_top_k(rows), bounds))
        scores = self.teachers.submit_score(rows, self.loss.spec, candidates)
        return [Asked(row, candidates[i], rollout.logprobs, scores[i]) for i, (row, rollout) in enumerate(rollouts)]

    def _batch(self, asked: Sequence[Asked]) -> MicroBatch:
        rows = [a.row for a in asked]
        tokens = completion_ids(rows)
        drawn = [a.logprobs for a in asked if a.logprobs is not None]

        named = [a.candidates for a in asked if a.candidates is not None]
        candidates = np.concatenate(named).astype(np.int64) if named else None

        def targets(scores: Sequence[Scores]) -> Targets:
            return self.loss.targets(tokens, scores, self.loss.spec.temperatures, candidates)

        rollout_logprobs = torch.from_numpy(np.concatenate(drawn)) if drawn else None
        return MicroBatch(rows, lambda: [a.score.result() for a in asked], targets, rollout_logprobs)

    def _own_top_k(self, rows: Sequence[Row]) -> Ids:
        """int32[N,K]: the student's most likely ids at each completion token, chosen without looking at the token."""
        model, pad_id = self.student.model, self.student.tokenizer.pad_token_id
        inputs = forward_inputs(model, rows, pad_id, next(model.parameters()).device)

        def choose(hidden: torch.Tensor, head: Any) -> torch.Tensor:
            return student_top_k(
                hidden, Head(head.weight, getattr(head, "bias", None), self.loss.vocab_size), self.loss.top_k
            )

        training = model.training
        model.eval()  # as it sampled
        with torch.no_grad():
            ids = model(**inputs, objective=choose)
        model.train(training)
        return ids_array(ids.cpu().numpy(), 2)
