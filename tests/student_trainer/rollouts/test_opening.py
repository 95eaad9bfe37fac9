"""Which engine a configuration gets, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoModelForCausalLM, Qwen2Config

from student_trainer.config import Config
from student_trainer.errors import UserError
from student_trainer.rollouts import in_order, open_engine
from student_trainer.rollouts import opening as module
from tests.student_trainer.rollouts.engines import EOS_IDS, VOCAB_SIZE, open_one, prompts, tokens


def opened(model: Any, **options: Any) -> Any:
    config = Config.model_validate({"policy_distillation": options})
    return open_engine(config, model, vocab_size=VOCAB_SIZE, eos_ids=EOS_IDS, pad_id=260)


@pytest.fixture(scope="module")
def sliding() -> Any:
    """A student whose upper layers see the last 8 tokens alone."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    return AutoModelForCausalLM.from_config(Qwen2Config(vocab_size=320, num_hidden_layers=2, **sizes, **window))


def test_auto_refills_slots_where_all_layers_see_the_whole_past(student: Any, sliding: Any) -> None:
    assert opened(student).name == "continuous"
    assert opened(sliding).name == "padded"
    assert opened(student, rollout_engine="padded").name == "padded"
    assert opened(student, rollout_slots=3).slots == 3


def test_a_student_that_cannot_refill_slots_is_refused_by_name(sliding: Any) -> None:
    with pytest.raises(UserError, match=r"rollout_engine: Qwen2ForCausalLM has layers .* use padded"):
        opened(sliding, rollout_engine="continuous")


def test_vllm_that_is_not_installed_is_refused_with_what_to_install(
    student: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"vLLM is not installed here; run: pip install 'strong2weak\[vllm\]'"):
        opened(student, rollout_engine="vllm")


def test_padded_and_continuous_draw_the_same_rollouts(student: Any) -> None:
    options: dict[str, Any] = {"max_new_tokens": 16, "temperature": 1.0, "seed": 1}
    found = [tokens(in_order(open_one(name, student), prompts(12), **options)) for name in ("padded", "continuous")]
    assert found[0] == found[1]


def test_logits_that_are_not_finite_are_named(student: Any) -> None:
    weight = student.model.norm.weight.detach()
    kept = weight.clone()
    try:
        weight.fill_(float("nan"))
        for name in ("padded", "continuous"):
            with pytest.raises(UserError, match="the student's logits are not finite"):
                in_order(open_one(name, student), prompts(2), max_new_tokens=4, temperature=1.0, seed=0)
    finally:
        weight.copy_(kept)
