"""Sampling from the student: ends, vocabulary, distribution, repeatability."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from protos.scores import FinishReason, Ids, Message, Mode
from student_trainer.modes import render
from student_trainer.rollouts import sample, sample_sorted
from student_trainer.rollouts.padded import cut_at_end, pad_left
from tests.student_trainer.conftest import STUDENT


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(STUDENT)


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> list[Ids]:
    problems = ["Calculate\n3+4", "Calculate\n13+24-5", "Calculate\n99+1+2+3"]
    return [render(tokenizer, (Message("user", p),), mode) for p in problems for mode in Mode] * 3


@pytest.fixture(scope="module")
def options(model: Any, tokenizer: Any) -> dict[str, Any]:
    eos = model.generation_config.eos_token_id
    return {
        "vocab_size": len(tokenizer),
        "eos_ids": tuple(eos) if isinstance(eos, list) else (eos,),
        "pad_id": tokenizer.pad_token_id,
    }


def test_prompts_are_padded_on_the_left() -> None:
    ids, mask = pad_left([np.array([1, 2], np.int32), np.array([3, 4, 5], np.int32)], 9)
    assert ids.tolist() == [[9, 1, 2], [3, 4, 5]]
    assert mask.tolist() == [[0, 1, 1], [1, 1, 1]]


def test_a_row_ends_with_its_first_end_token_and_a_truncated_one_has_none() -> None:
    tokens = np.array([[5, 2, 0, 0], [5, 6, 7, 8], [5, 6, 2, 0], [2, 5, 2, 0]])
    lengths, stopped = cut_at_end(tokens, (2, 3), np.array([4, 4, 2, 4]))
    assert lengths.tolist() == [2, 4, 2, 1]
    assert stopped.tolist() == [True, False, False, True]


def test_a_sampled_end_stays_and_none_is_added(model: Any, prompts: list[Ids], options: dict[str, Any]) -> None:
    rollouts = sample(model, prompts, max_new_tokens=4, temperature=1.5, seed=1, **options)
    reasons = {r.finish_reason for r in rollouts}
    assert reasons == {FinishReason.STOP, FinishReason.LENGTH}
    for rollout in rollouts:
        ends = np.isin(rollout.completion_ids, options["eos_ids"])
        assert not ends[:-1].any()
        assert bool(ends[-1]) == (rollout.finish_reason is FinishReason.STOP)
        assert (len(rollout.completion_ids) == 4) or rollout.finish_reason is FinishReason.STOP


def test_padded_ids_are_never_sampled(model: Any, prompts: list[Ids], options: dict[str, Any]) -> None:
    rollouts = sample(model, prompts, max_new_tokens=24, temperature=50.0, seed=2, **options)
    ids = np.concatenate([r.completion_ids for r in rollouts])
    assert model.config.vocab_size > options["vocab_size"]
    assert len(np.unique(ids)) > 100
    assert ids.max() < options["vocab_size"]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_log_probabilities_are_those_of_the_model_at_the_temperature(
    model: Any, prompts: list[Ids], options: dict[str, Any], temperature: float
) -> None:
    rollouts = sample(model, prompts, max_new_tokens=12, temperature=temperature, seed=3, logprobs=True, **options)
    for rollout in rollouts:
        ids = torch.from_numpy(np.concatenate([rollout.prompt_ids, rollout.completion_ids]).astype(np.int64))
        with torch.no_grad():
            logits = model(ids[None]).logits[0, len(rollout.prompt_ids) - 1 : -1, : options["vocab_size"]]
        expected = (logits / temperature).log_softmax(-1).gather(1, ids[len(rollout.prompt_ids) :, None])[:, 0]
        assert rollout.logprobs is not None
        np.testing.assert_allclose(rollout.logprobs, expected.numpy(), atol=2e-4)


def test_a_models_own_sampling_settings_change_nothing(model: Any, prompts: list[Ids], options: dict[str, Any]) -> None:
    plain = sample(model, prompts, max_new_tokens=8, temperature=1.0, seed=4, **options)
    kept = model.generation_config
    try:
        model.generation_config = type(kept)(**{**kept.to_dict(), "top_k": 1, "top_p": 0.1, "do_sample": True})
        again = sample(model, prompts, max_new_tokens=8, temperature=1.0, seed=4, **options)
    finally:
        model.generation_config = kept
    assert [r.completion_ids.tolist() for r in plain] == [r.completion_ids.tolist() for r in again]


def test_a_seed_repeats_the_draw_and_leaves_the_global_state_alone(
    model: Any, prompts: list[Ids], options: dict[str, Any]
) -> None:
    before = torch.random.get_rng_state()
    first, again = (sample(model, prompts, max_new_tokens=8, temperature=1.0, seed=5, **options) for _ in range(2))
    assert [r.completion_ids.tolist() for r in first] == [r.completion_ids.tolist() for r in again]
    assert torch.equal(before, torch.random.get_rng_state())


def test_greedy_answers_do_not_depend_on_the_batch(model: Any, prompts: list[Ids], options: dict[str, Any]) -> None:
    together = sample(model, prompts, max_new_tokens=10, temperature=0.0, **options)
    sorted_ = sample_sorted(model, prompts, rows=2, max_new_tokens=10, temperature=0.0, **options)
    assert [r.completion_ids.tolist() for r in together] == [r.completion_ids.tolist() for r in sorted_]
    assert [r.prompt_ids.tolist() for r in sorted_] == [p.tolist() for p in prompts]


def test_prompt_and_completion_stay_within_max_length(model: Any, prompts: list[Ids], options: dict[str, Any]) -> None:
    limit = max(len(p) for p in prompts) + 2
    rollouts = sample(model, prompts, max_new_tokens=50, temperature=5.0, max_length=limit, seed=6, **options)
    assert max(len(r.prompt_ids) + len(r.completion_ids) for r in rollouts) <= limit


def test_the_model_is_left_in_the_mode_it_was_in(model: Any, prompts: list[Ids], options: dict[str, Any]) -> None:
    for training in (True, False):
        model.train(training)
        sample(model, prompts[:1], max_new_tokens=2, temperature=1.0, **options)
        assert model.training is training
