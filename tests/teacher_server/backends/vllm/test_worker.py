"""The scorer in the place of the V2 runner's, fed as that runner feeds it; the CPU's engine has the older runner."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from protos.scores import ScoreSpec, Sequence
from teacher_server.backends.readout import Rows, read_chunk
from teacher_server.backends.vllm_scorer import PromptScorer
from teacher_server.backends.vllm_tap import Kept
from teacher_server.backends.vllm_wire import Question
from teacher_server.backends.vllm_worker import _RunnerV2

pytestmark = pytest.mark.vllm
VOCAB, WIDTH, SLOTS, LONGEST = 50, 8, 4, 40


class Stock:
    """The runner's own: knows what it was told."""

    def __init__(self) -> None:
        self.added: list[tuple[str, Any]] = []
        self.removed: list[str] = []

    def add_request(self, name: str, index: int, params: Any) -> None:
        self.added.append((name, params.prompt_logprobs))

    def remove_request(self, name: str) -> None:
        self.removed.append(name)

    def compute_prompt_logprobs(self, *_: Any) -> dict[str, Any]:
        return {"other": "its own"}


@pytest.fixture
def model() -> Any:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCAB, WIDTH, generator=generator)

    def read(states: torch.Tensor, rows: Rows, spec: Any, fields: Any, *, plain: bool) -> Any:
        return read_chunk(states @ weight.t(), rows, spec, fields)

    return SimpleNamespace(weight=weight, read=read, hidden=torch.randn(SLOTS, LONGEST, WIDTH, generator=generator))


def batch(parts: list[tuple[str, int, int, int]]) -> Any:
    """Of (name, slot, first token, tokens) what the runner says of a step."""
    names, slots, firsts, counts = zip(*parts, strict=True)
    return SimpleNamespace(
        req_ids=list(names),
        idx_mapping_np=np.array(slots),
        num_computed_prefill_tokens_np=np.array(firsts),
        num_scheduled_tokens=np.array(counts),
        query_start_loc_np=np.cumsum([0, *counts]),
    )


def test_rows_of_several_prompts_over_several_steps_make_their_scores(model: Any) -> None:
    from vllm import SamplingParams

    stock, scorer = Stock(), PromptScorer(model.read, torch.device("cpu"), chunk=7)
    runner = _RunnerV2(stock, scorer)
    rng = np.random.default_rng(0)
    tokens = torch.from_numpy(rng.integers(0, VOCAB, (SLOTS, LONGEST)).astype(np.int32))
    lengths = np.array([20, 9, 33, 5])
    asked = rng.integers(0, VOCAB, (31, 2)).astype(np.int32)
    sequences = {
        "a": (0, Sequence(tokens[0, :20].numpy(), 1), ScoreSpec(3)),
        "c": (2, Sequence(tokens[2, :33].numpy(), 2, asked), ScoreSpec(5, (2.0,))),
        "d": (3, Sequence(tokens[3, :5].numpy(), 4), ScoreSpec(3)),
    }
    for name, (slot, sequence, spec) in sequences.items():
        extra = Question.about(sequence, spec).extra_args()
        runner.add_request(name, slot, SamplingParams(prompt_logprobs=0, extra_args=extra))
    runner.add_request("other", 1, SamplingParams(prompt_logprobs=4))
    assert stock.added == [("a", None), ("c", None), ("d", None), ("other", 4)]

    answers: dict[str, Any] = {}
    steps = [
        [("a", 0, 0, 12), ("other", 1, 0, 9), ("c", 2, 0, 1)],
        [("c", 2, 1, 16), ("a", 0, 12, 8)],
        [("c", 2, 0, 20), ("d", 3, 0, 5)],  # c was thrown out and begins again
        [("c", 2, 20, 13)],
        [("a", 0, 20, 1)],  # decodes
    ]
    for step in steps:
        hidden = torch.cat([model.hidden[slot, first : first + count] for _, slot, first, count in step])
        got = runner.compute_prompt_logprobs(None, hidden, batch(step), tokens, None, lengths)
        assert got.pop("other") == "its own"
        answers |= got
    assert answers.keys() == sequences.keys()
    for name, (slot, sequence, spec) in sequences.items():
        scores = Kept(answers[name]).answer().scores(Question.about(sequence, spec))
        rows = slice(sequence.score_start - 1, len(sequence.token_ids) - 1)
        ids = torch.from_numpy(sequence.token_ids[sequence.score_start :]).long()
        candidates = None if sequence.candidate_ids is None else torch.from_numpy(sequence.candidate_ids)
        want = read_chunk(
            model.hidden[slot, rows] @ model.weight.t(), Rows(ids, candidates), spec, spec.fields(sequence.candidates)
        )
        for field, array in scores.arrays().items():
            np.testing.assert_allclose(array, want[field].numpy(), atol=1e-5, err_msg=f"{name} {field}")


def test_rows_that_the_engine_skipped_make_no_answer(model: Any) -> None:
    from vllm import SamplingParams

    stock, scorer = Stock(), PromptScorer(model.read, torch.device("cpu"), chunk=7)
    runner = _RunnerV2(stock, scorer)
    tokens = torch.zeros(SLOTS, LONGEST, dtype=torch.int32)
    for name in ("late", "gone"):
        extra = Question.about(Sequence(np.zeros(10, np.int32), 3), ScoreSpec(2)).extra_args()
        runner.add_request(name, 0, SamplingParams(prompt_logprobs=0, extra_args=extra))
    runner.remove_request("gone")
    assert stock.removed == ["gone"]
    assert scorer.names == ["late"]
    hidden = model.hidden[0, 4:10]  # as after a hit in a prefix cache
    got = runner.compute_prompt_logprobs(None, hidden, batch([("late", 0, 4, 6)]), tokens, None, np.array([10]))
    assert got["late"] is None
    assert scorer.names == []
