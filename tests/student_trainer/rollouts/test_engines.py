"""What holds for every engine: distribution, log-probabilities, ends, limits, order, repeatability, new weights."""

from __future__ import annotations

import functools
import random
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch

from protos.scores import FinishReason
from student_trainer.rollouts import RolloutEngine, in_order
from tests.student_trainer.rollouts.engines import EOS_IDS, SLOTS, VOCAB_SIZE, prompts, recomputed, tokens


def test_draws_follow_the_softmax_at_the_temperature_over_the_real_vocabulary(
    engine: RolloutEngine, student: Any
) -> None:
    (prompt,), draws, temperature = prompts(1), 3000, 4.0
    rollouts = in_order(engine, [prompt] * draws, max_new_tokens=1, temperature=temperature, seed=11, rows=500)
    counts = np.bincount([r.completion_ids[0] for r in rollouts], minlength=VOCAB_SIZE)
    assert len(counts) == VOCAB_SIZE
    with torch.no_grad():
        logits = student(torch.from_numpy(prompt.astype(np.int64))[None].to(student.device)).logits[0, -1, :VOCAB_SIZE]
    expected = (logits.double() / temperature).softmax(-1).cpu().numpy() * draws
    often = expected >= 5
    observed = np.append(counts[often], counts[~often].sum())
    assert often.sum() > 50
    expected = np.append(expected[often], expected[~often].sum())
    chi_square = ((observed - expected) ** 2 / expected).sum()
    p_value = torch.special.gammaincc(torch.tensor((len(observed) - 1) / 2), torch.tensor(chi_square / 2).float())
    assert p_value > 1e-3


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_log_probabilities_are_the_students_own_at_the_temperature(
    engine: RolloutEngine, student: Any, temperature: float
) -> None:
    options: dict[str, Any] = {"max_new_tokens": 24, "temperature": temperature, "seed": 3}
    for rollout in in_order(engine, prompts(11), logprobs=True, **options):
        assert rollout.logprobs is not None
        assert rollout.logprobs.dtype == np.float32
        np.testing.assert_allclose(rollout.logprobs, recomputed(student, rollout, temperature), atol=1e-4)
    assert all(r.logprobs is None for r in in_order(engine, prompts(3), **options))


def test_new_weights_count_from_the_next_sample_on(engine: RolloutEngine, student: Any) -> None:
    options: dict[str, Any] = {"max_new_tokens": 16, "temperature": 1.0, "seed": 4, "logprobs": True}
    before = in_order(engine, prompts(6), **options)
    kept = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    numbers = torch.Generator().manual_seed(0)
    try:
        for _ in range(2):
            with torch.no_grad():
                for parameter in student.parameters():
                    noise = torch.randn(parameter.shape, generator=numbers).to(parameter.device)
                    parameter.add_(0.3 * parameter.std() * noise)
            engine.update_weights()
            changed = in_order(engine, prompts(6), **options)
            for rollout in changed:
                np.testing.assert_allclose(rollout.logprobs, recomputed(student, rollout, 1.0), atol=1e-4)
    finally:
        student.load_state_dict(kept)
        engine.update_weights()
    assert tokens(changed) != tokens(before)
    assert tokens(in_order(engine, prompts(6), **options)) == tokens(before)


def test_a_sampled_end_stays_and_a_truncated_completion_gets_none(engine: RolloutEngine) -> None:
    rollouts = in_order(engine, prompts(60), max_new_tokens=30, temperature=6.0, seed=5, rows=60)
    assert {r.finish_reason for r in rollouts} == {FinishReason.STOP, FinishReason.LENGTH}
    last = {int(r.completion_ids[-1]) for r in rollouts if r.finish_reason is FinishReason.STOP}
    assert last == set(EOS_IDS)
    for rollout in rollouts:
        ends = np.isin(rollout.completion_ids, EOS_IDS)
        assert not ends[:-1].any()
        assert bool(ends[-1]) == (rollout.finish_reason is FinishReason.STOP)
        assert len(rollout.completion_ids) == 30 or rollout.finish_reason is FinishReason.STOP


def test_ids_beyond_the_real_vocabulary_are_never_sampled(engine: RolloutEngine, student: Any) -> None:
    assert student.config.vocab_size > VOCAB_SIZE
    ids = np.concatenate(tokens(in_order(engine, prompts(40), max_new_tokens=30, temperature=1e3, seed=6, rows=40)))
    assert len(np.unique(ids)) > 200
    assert ids.max() < VOCAB_SIZE


def test_every_prompt_is_answered_in_its_place_within_its_own_limit(engine: RolloutEngine) -> None:
    wanted, limit = prompts(15), 30
    rollouts = in_order(engine, wanted, max_new_tokens=20, temperature=0.3, max_length=limit, seed=7)
    assert [r.prompt_ids.tolist() for r in rollouts] == [p.tolist() for p in wanted]
    lengths = {(len(r.completion_ids), min(20, limit - len(r.prompt_ids))) for r in rollouts if r.finish_reason.value}
    assert all(length <= most for length, most in lengths)
    truncated = [r for r in rollouts if r.finish_reason is FinishReason.LENGTH]
    assert all(len(r.completion_ids) == min(20, limit - len(r.prompt_ids)) for r in truncated)
    assert list(engine.sample([], max_new_tokens=3, temperature=1.0, seed=0)) == []


def test_a_rollout_comes_as_soon_as_it_has_ended(engine: RolloutEngine) -> None:
    if engine.name == "padded":
        pytest.skip("a batch ends as a whole")
    short, long = prompts(2)
    limited = long[:1].repeat(30)
    order = [i for i, _ in engine.sample([short, limited], max_new_tokens=40, temperature=0.3, max_length=31, seed=8)]
    assert order == [1, 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_neither_order_nor_company_nor_rows_change_a_rollout(engine: RolloutEngine, temperature: float) -> None:
    wanted = prompts(9)
    options: dict[str, Any] = {"max_new_tokens": 16, "temperature": temperature, "seed": 9}
    first = tokens(in_order(engine, wanted, **options))
    assert tokens(in_order(engine, wanted[::-1], **options))[::-1] == first
    assert tokens(in_order(engine, wanted[3:5], **options)) == first[3:5]
    assert tokens(in_order(engine, wanted, rows=1, **options)) == first
    assert tokens(in_order(engine, wanted, rows=SLOTS + 3, **options)) == first


def test_seeds_names_and_repeated_prompts_have_luck_of_their_own(engine: RolloutEngine) -> None:
    options: dict[str, Any] = {"max_new_tokens": 16, "temperature": 3.0}
    wanted = prompts(1) * 4
    first = tokens(in_order(engine, wanted, seed=1, **options))
    assert len({tuple(t) for t in first}) == 4
    assert tokens(in_order(engine, wanted, seed=1, **options)) == first
    assert tokens(in_order(engine, wanted, seed=2, **options)) != first
    named = tokens(in_order(engine, wanted, seed=1, names=["a", "b", "c", "d"], **options))
    assert tokens(in_order(engine, wanted, seed=1, names=["d", "c", "b", "a"], **options)) == named[::-1]


def test_what_is_not_waited_for_leaves_no_trace(engine: RolloutEngine) -> None:
    options: dict[str, Any] = {"max_new_tokens": 16, "temperature": 1.0, "seed": 10}
    wanted = tokens(in_order(engine, prompts(9), **options))
    begun = iter(engine.sample(prompts(9), **options))
    next(begun)
    begun.close()  # type: ignore[attr-defined]
    assert tokens(in_order(engine, prompts(9), **options)) == wanted


def test_random_numbers_and_mode_of_the_training_stay_as_they_were(engine: RolloutEngine, student: Any) -> None:
    for training in (True, False):
        student.train(training)
        before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        in_order(engine, prompts(3), max_new_tokens=4, temperature=1.0, seed=0)
        assert student.training is training
        assert torch.equal(before[0], torch.get_rng_state())
        assert np.array_equal(before[1], np.random.get_state()[1])
        assert before[2] == random.getstate()


def test_gradients_can_be_taken_between_two_rollouts(engine: RolloutEngine, student: Any) -> None:
    ids = torch.arange(4, device=student.device)[None]
    for _ in engine.sample(prompts(6), max_new_tokens=4, temperature=1.0, seed=0):
        assert student(ids).logits.requires_grad


def test_a_forward_pass_under_autocast_samples_too(
    engine: RolloutEngine, student: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = type(student).forward

    @functools.wraps(plain)
    def forward(self: Any, *arguments: Any, **options: Any) -> Any:
        with torch.autocast(self.device.type, torch.bfloat16):
            return plain(self, *arguments, **options)

    monkeypatch.setattr(student, "forward", MethodType(forward, student), raising=True)
    for rollout in in_order(engine, prompts(7), max_new_tokens=9, temperature=1.0, seed=2, logprobs=True):
        assert rollout.logprobs is not None
        assert np.abs(rollout.logprobs - recomputed(student, rollout, 1.0)).max() < 0.2  # bfloat16
