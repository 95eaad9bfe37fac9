"""Stage 2 on a mixture: which examples are the student's own, what the others train on, and what stays as it was."""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from protos.scores import Mode, Sampling
from student_trainer.config import Config
from student_trainer.data import Example, read_examples
from student_trainer.errors import UserError
from student_trainer.evaluation import Student, requests_for
from student_trainer.feed import MicroBatch
from student_trainer.losses import ImportanceWeights
from student_trainer.mixture import MixedFeed
from student_trainer.on_policy import RolloutFeed
from student_trainer.responses import Response, collect
from student_trainer.row_scores import RowScores
from student_trainer.run import run
from student_trainer.schedule import Step
from student_trainer.stage import open_student
from student_trainer.stage_loss import StageLoss
from student_trainer.teacher_client import connect
from student_trainer.teachers import Teacher, Teachers
from tests.servers import ROOT
from tests.student_trainer.conftest import STUDENT
from tests.student_trainer.test_distributed import torchrun
from tests.student_trainer.test_stages import assert_same_weights, settings

STEP = Step(0, 0, ((0, 1, 2, 3), (4, 5, 6, 7)))


@dataclass(frozen=True)
class World:
    """A teacher, a student, and what is needed to make a feed of them."""

    teachers: Teachers
    student: Student
    examples: list[Example]
    responses: list[Response]
    folder: Path

    def config(self, share: float, **policy: Any) -> Config:
        return settings(self.folder, "unused:1", policy_distillation={"lambda": share, **policy})

    def loss(self, config: Config) -> StageLoss:
        return StageLoss.on_policy(config.policy_distillation, self.teachers.normalized_size)

    def rollouts(self, config: Config) -> RolloutFeed:
        return RolloutFeed(config, self.examples, self.student, self.teachers, self.loss(config))

    def mixed(self, share: float, responses: Sequence[Response] | None = None, **policy: Any) -> MixedFeed:
        config = self.config(share, **policy)
        loss = self.loss(config)
        scores = RowScores(self.teachers, loss.spec)
        given = self.responses if responses is None else responses
        return MixedFeed(config, self.rollouts(config), given, scores, loss)


@pytest.fixture(scope="module")
def world(pair_teacher: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("mixture")
    with connect(pair_teacher["grpc"]) as client:
        teachers = Teachers([Teacher(client, client.teacher())])
        student = open_student(settings(folder, "unused:1"), str(STUDENT), teachers.vocab_size)
        examples = read_examples(ROOT / "dataset" / "arithmetic.json")[:16]
        requests = requests_for(student.tokenizer, [(e, m) for e in examples[:12] for m in Mode], 96)
        responses = collect(teachers, requests, Sampling(24, 0.6, seed=1), folder / "responses")
        yield World(teachers, student, examples, responses, folder)


def taken(feed: Any, step: Step = STEP) -> list[MicroBatch]:
    feed.announce(step)
    found: list[MicroBatch] = feed.take(step)
    return found


def rows_of(batches: Sequence[MicroBatch]) -> list[bytes]:
    return [row.ids.tobytes() for batch in batches for row in batch.rows]


def test_lambda_is_the_share_of_examples_and_each_is_drawn_by_seed_epoch_and_id(world: World) -> None:
    feeds = {share: world.mixed(share) for share in (0.0, 0.3, 1.0)}
    draws = {s: [[f.on_policy(i, e) for e in range(400)] for i in range(len(f))] for s, f in feeds.items()}
    assert np.mean(draws[0.0]) == 0
    assert np.mean(draws[1.0]) == 1
    assert np.mean(draws[0.3]) == pytest.approx(0.3, abs=0.02)
    assert all(0.2 < np.mean(one) < 0.4 for one in draws[0.3]), "an example is not always the same kind"
    assert all(0.05 < np.mean(epoch) < 0.6 for epoch in np.array(draws[0.3]).T.reshape(-1, 20, 16).mean(1))
    again = world.mixed(0.3)
    assert [[again.on_policy(i, e) for e in range(400)] for i in range(len(again))] == draws[0.3]


def test_at_lambda_1_a_mixture_is_the_feed_of_rollouts_bit_by_bit(world: World) -> None:
    plain, mixture = taken(world.rollouts(world.config(1.0))), taken(world.mixed(1.0))
    assert rows_of(mixture) == rows_of(plain)
    for one, other in zip(plain, mixture, strict=True):
        first, second = one.targets(one.scores()), other.targets(other.scores())
        assert torch.equal(first.logprobs_NK, second.logprobs_NK)  # type: ignore[union-attr]
        assert one.rollout_logprobs is other.rollout_logprobs is None


def test_at_lambda_0_the_student_is_asked_for_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RolloutFeed, "announce", None)
    monkeypatch.setattr(RolloutFeed, "take", None)
    batches = taken(world.mixed(0.0))
    known = {r.ids.tobytes() for r in world.responses}
    assert len(batches) == 2
    assert len(rows_of(batches)) == 8
    assert set(rows_of(batches)) <= known


def test_a_step_has_every_example_once_as_a_rollout_or_as_its_own_response_in_its_mode(world: World) -> None:
    feed = world.mixed(0.5)
    batches = taken(feed)
    own = [i for i in range(8) if feed.on_policy(i, 0)]
    assert 0 < len(own) < 8
    rows = [row for batch in batches for row in batch.rows]
    assert len(rows) == 8
    names = Counter(row.name.partition(" ")[0] for row in rows)
    assert names == Counter(e.id for e in world.examples[:8])
    known = {r.ids.tobytes(): r for r in world.responses}
    others = {world.examples[i].id for i in range(8) if i not in own}
    found = {row.name.partition(" ")[0]: row for row in rows}
    assert all(known[found[name].ids.tobytes()].example_id == name for name in others)
    plain = {row.name: row for batch in taken(world.rollouts(world.config(1.0))) for row in batch.rows}
    modes = {name.partition(" ")[0]: row.mode for name, row in plain.items()}
    assert {name: row.mode for name, row in found.items()} == modes
    longest = [max(len(row.ids) for row in batch.rows) for batch in batches]
    assert longest == sorted(longest)


def test_every_row_of_a_mixture_has_its_own_targets(world: World) -> None:
    feed = world.mixed(0.5)
    (client,) = (t.client for t in world.teachers.all)
    for batch in taken(feed):
        targets = batch.targets(batch.scores())
        direct = client.score([row.tokens() for row in batch.rows], feed.loss.spec)
        tokens = np.concatenate([row.ids[row.start :] for row in batch.rows])
        assert targets.token_ids_N is not None
        np.testing.assert_array_equal(targets.token_ids_N.numpy(), tokens)
        expected = np.concatenate([s.token_logprobs for s in direct if s.token_logprobs is not None])
        np.testing.assert_allclose(targets.token_logprobs_N.numpy(), expected, atol=1e-5)  # type: ignore[union-attr]


def test_an_example_without_a_response_gets_one_of_another_in_its_mode(world: World) -> None:
    feed = world.mixed(0.0)
    foreign = {feed.response(15, epoch).name for epoch in range(40)}
    assert len(foreign) > 5
    thinking = world.mixed(0.0, [r for r in world.responses if r.mode is Mode.THINKING], thinking_prob=0.0)
    assert thinking.response(0, 0).mode is Mode.THINKING, "responses of the other mode are better than none"


def test_responses_among_old_rollouts_are_not_weighed(world: World) -> None:
    feed = world.mixed(0.5, max_staleness=1)
    second = Step(1, 0, ((8, 9, 10, 11), (12, 13, 14, 15)))
    feed.announce(STEP)
    feed.announce(second)
    seen = 0
    for batch in feed.take(STEP):
        if batch.rollout_logprobs is None:
            continue
        assert batch.begins is not None
        now = torch.linspace(-3, 0, len(batch.rollout_logprobs))
        weights = ImportanceWeights(batch.rollout_logprobs, batch.begins, (0.0, 2.0)).of(slice(0, len(now)), now)
        first = 0
        for row in batch.rows:
            last = first + len(row.ids) - row.start
            own = feed.on_policy([e.id for e in world.examples].index(row.name.partition(" ")[0]), 0)
            one = torch.equal(weights[first:last], torch.ones(last - first))
            assert one or own
            assert weights[first] == 1
            seen, first = seen + (not own), last
    assert seen


def test_what_is_in_flight_goes_on_from_a_checkpoint(world: World, tmp_path: Path) -> None:
    feed = world.mixed(0.5, max_staleness=2)
    given = tuple(i for i in range(16) if not feed.on_policy(i, 0))
    steps = [STEP, Step(1, 0, ((8, 9, 10, 11),)), Step(2, 0, (given,))]
    for step in steps:
        feed.announce(step)
    feed.take(STEP)
    for number in (1, 2):
        folder, again = tmp_path / str(number), world.mixed(0.5, max_staleness=2)
        folder.mkdir()
        feed.save(folder, number)
        again.restore(folder)
        for step in steps[number:]:
            again.announce(step)
        taken_again = again.take(steps[number])
        assert rows_of(taken_again) == rows_of(feed.take(steps[number]))


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_mixture_that_goes_on_ends_with_the_weights_of_one_that_never_stopped(
    pair_teacher: dict[str, Any], tmp_path: Path, share: float
) -> None:
    def go(stage: str, resume: bool = False) -> str:
        shown = io.StringIO()
        config = settings(
            tmp_path,
            pair_teacher["grpc"],
            data={"val_path": None, "val_ratio": 0.0},
            training={"resume": resume},
            non_policy_distillation={"max_steps": 1},
            policy_distillation={"lambda": share, "max_staleness": 1},
        )
        run(config, stage, None, Console(file=shown, width=200))
        return shown.getvalue()

    go("all")
    folder = tmp_path / "outputs" / "policy_distillation"
    shutil.copytree(folder, tmp_path / "whole")
    for path in folder.iterdir():
        if path.is_dir() and path.name != "policy_checkpoint-2":
            shutil.rmtree(path)
    assert "going on from" in go("policy", resume=True)
    assert_same_weights(folder / "final_policy_model", tmp_path / "whole" / "final_policy_model", 0.0)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "seconds_teacher" in line]
    assert len(steps) == 4
    assert all(line["completion_tokens"] > 0 for line in steps)
    assert (
        f"share of the student's own answers, lambda | `{share}`"
        in (folder / "final_policy_model" / "README.md").read_text()
    )


@pytest.mark.slow
def test_two_processes_train_on_a_mixture_with_a_teacher_for_each_mode(
    pair_teacher: dict[str, Any], student_as_teacher: dict[str, Any], tmp_path: Path
) -> None:
    routes = [
        {"endpoint": pair_teacher["grpc"], "mode": "thinking"},
        {"endpoint": student_as_teacher["grpc"], "mode": "non_thinking"},
    ]
    sections: dict[str, dict[str, Any]] = {
        "teacher": {"endpoint": None, "routes": routes},
        "non_policy_distillation": {"batch_size": 2, "max_steps": 1},
        "policy_distillation": {"batch_size": 2, "lambda": 0.3, "max_staleness": 1, "max_steps": 3},
    }
    shown = torchrun(tmp_path, 2, None, "all", **sections)
    assert shown.count("after stage 2") == 1
    assert "stage 2, on-policy step 3/3: loss" in shown
    folder = tmp_path / "outputs" / "policy_distillation"
    stores = {path.parent.name for path in (folder / "scores").glob("*/scores-?.bin") if path.stat().st_size}
    writers = {path.name for path in (folder / "scores").glob("*/scores-?.bin") if path.stat().st_size}
    assert len(stores) == 2, "one for each teacher"
    assert writers == {"scores-0.bin", "scores-1.bin"}, "each process asks for its own rows"


def test_a_mixture_without_responses_is_refused_before_anything_is_opened(tmp_path: Path) -> None:
    config = settings(tmp_path, "127.0.0.1:1", policy_distillation={"lambda": 0.5})
    where = tmp_path / "outputs" / "non_policy_distillation" / "responses.parquet"
    with pytest.raises(UserError, match=f"there are none at {where}; run stage 1 before"):
        run(config, "policy", None, Console(file=io.StringIO()))
