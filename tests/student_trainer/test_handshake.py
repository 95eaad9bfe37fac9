"""The handshake lets a fitting teacher pass and refuses every difference, naming both values and the next step."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from protos.scores import Field, Limits, Mode, TeacherInfo
from protos.tokenizer_hash import hash_of_template, hash_of_tokenizer
from student_trainer.config import Config
from student_trainer.errors import UserError
from student_trainer.handshake import Use, check, needed_fields, needed_modes
from tests import tiny_qwen3
from tests.student_trainer.live import teacher_info

WIDTH = 320


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    folder: Path = tmp_path_factory.mktemp("tiny")
    tiny_qwen3.make(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def info(tokenizer: Any) -> TeacherInfo:
    """A teacher that fits the tiny student and the default configuration."""
    return teacher_info(
        tokenizer_hash=hash_of_tokenizer(tokenizer),
        template_hash=hash_of_template(tokenizer),
        vocab_size=len(tokenizer),
        normalized_size=len(tokenizer),
        eos_token_ids=(tokenizer.eos_token_id, 7),
        limits=Limits(4096, 128, 128, 100_000, 1000),
    )


def config(**sections: dict[str, Any]) -> Config:
    return Config.model_validate(sections)


def test_a_teacher_that_fits_passes(info: TeacherInfo, tokenizer: Any) -> None:
    for stage in ("all", "non_policy", "policy", "test"):
        check(info, tokenizer, WIDTH, Config(), stage=stage)
    check(replace(info, normalized_size=WIDTH), tokenizer, WIDTH, Config())


def test_the_transformers_backend_describes_the_same_tokenizer(
    tokenizer: Any, tmp_path: Path, info: TeacherInfo
) -> None:
    from teacher_server.backends.text import HuggingFaceText

    text = HuggingFaceText(tiny_qwen3.make(tmp_path))
    assert (text.tokenizer_hash, text.template_hash, text.vocab_size) == (
        info.tokenizer_hash,
        info.template_hash,
        info.vocab_size,
    )


OTHERS: list[tuple[dict[str, Any], list[str]]] = [
    ({"vocab_size": 300}, ["its vocabulary has 300 tokens, the student's 261", "same tokenizer files"]),
    ({"tokenizer_hash": "abc"}, ["its tokenizer has the hash abc, the student's"]),
    (
        {"template_hash": "abc"},
        ["its chat template has the hash abc, the student's", "copy the teacher's chat_template"],
    ),
    ({"template_hash": ""}, ["its chat template has the hash none"]),
    ({"normalized_size": 321}, ["it normalises over 321 logits, the student has 320"]),
    ({"normalized_size": 260}, ["it normalises over 260 logits, fewer than the student's 261 tokens"]),
    (
        {"eos_token_ids": (5, 3)},
        ["its completions end with the ids [3, 5], the student's with [", "generation_config.json"],
    ),
    (
        {"limits": Limits(1024, 128, 128, 9, 9)},
        ["takes 1024 tokens in a sequence, data.max_length is 2048", "set data.max_length=1024 or less"],
    ),
    ({"limits": Limits(4096, 32, 128, 9, 9)}, ["it accepts 32, non_policy_distillation.top_k is 64"]),
    (
        {"fields": frozenset({Field.TOP})},
        ["it cannot give log_normalizer, tail_logprob, only top", "choose another loss"],
    ),
    ({"modes": (Mode.THINKING,)}, ["the run needs the mode non_thinking, its chat template knows thinking"]),
    ({"modes": ()}, ["the run needs the mode non_thinking, thinking, its chat template knows none"]),
    ({"can_generate": False}, ["scores and does not generate, stage 1 needs responses", "dataset_path"]),
]


@pytest.mark.parametrize(("changes", "texts"), OTHERS)
def test_a_difference_is_refused_naming_both_values_and_what_to_do(
    info: TeacherInfo, tokenizer: Any, changes: dict[str, Any], texts: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        check(replace(info, **changes), tokenizer, WIDTH, Config())
    line = str(caught.value)
    assert line.startswith("teacher scripted: ")
    assert all(text in line for text in texts), line
    assert caught.value.next_step


def test_of_several_teachers_the_students_template_is_the_common_one(info: TeacherInfo, tokenizer: Any) -> None:
    other, use = replace(info, template_hash="abc"), Use("teacher.routes.1 (thinking)")
    pattern = (
        r"at teacher\.routes\.1 \(thinking\): its chat template .*copy the student's chat_template\.jinja into this"
    )
    with pytest.raises(UserError, match=pattern):
        check(other, tokenizer, WIDTH, Config(), use=use)


def test_an_expected_fingerprint_is_compared(info: TeacherInfo, tokenizer: Any) -> None:
    check(info, tokenizer, WIDTH, Config(), use=Use(fingerprint="f1"))
    with pytest.raises(UserError, match="its fingerprint is f1, the configuration expects f9; start that teacher"):
        check(info, tokenizer, WIDTH, Config(), use=Use(fingerprint="f9"))


def test_the_students_own_end_ids_are_compared(info: TeacherInfo, tokenizer: Any) -> None:
    check(info, tokenizer, WIDTH, Config(), eos_ids=[7])
    with pytest.raises(UserError, match=r"the student's with \[7, 9\]"):
        check(info, tokenizer, WIDTH, Config(), eos_ids=[7, 9])
    with pytest.raises(UserError, match="no id ends the student's completions"):
        check(info, tokenizer, WIDTH, Config(), eos_ids=[])


def test_only_what_a_stage_needs_is_asked_for(info: TeacherInfo, tokenizer: Any) -> None:
    mute = replace(info, can_generate=False)
    check(mute, tokenizer, WIDTH, Config(), stage="policy")
    check(mute, tokenizer, WIDTH, config(non_policy_distillation={"dataset_path": "x"}))
    poor = replace(info, fields=frozenset({Field.TOKEN_LOGPROBS, Field.LOG_NORMALIZER}))
    check(poor, tokenizer, WIDTH, config(policy_distillation={"loss": "policy_gradient"}), stage="policy")
    check(poor, tokenizer, WIDTH, config(non_policy_distillation={"alpha": 0}), stage="non_policy")
    small = replace(info, limits=replace(info.limits, candidates=8))
    check(small, tokenizer, WIDTH, Config())
    with pytest.raises(
        UserError, match=r"it accepts 8, policy_distillation\.top_k is 64; set policy_distillation\.top_k=8"
    ):
        check(small, tokenizer, WIDTH, config(policy_distillation={"support": "student"}))


def test_a_whole_distribution_needs_hidden_states_and_no_top_k(info: TeacherInfo, tokenizer: Any) -> None:
    full = config(
        non_policy_distillation={"distribution": "full", "top_k": 9999},
        policy_distillation={"distribution": "full", "top_k": 9999},
    )
    for stage in ("all", "non_policy", "policy"):
        assert needed_fields(full, stage) == {Field.HIDDEN_STATES}
    check(info, tokenizer, WIDTH, full)
    without = replace(info, fields=info.fields - {Field.HIDDEN_STATES})
    with pytest.raises(UserError, match=r"cannot give hidden_states, only .*; choose another loss, distribution top_k"):
        check(without, tokenizer, WIDTH, full)
    first = config(non_policy_distillation={"distribution": "full"})
    assert Field.TOP not in needed_fields(first, "non_policy")
    assert needed_fields(first, "all") >= {Field.HIDDEN_STATES, Field.TOP}
    assert Field.HIDDEN_STATES not in needed_fields(first, "policy")


def test_needed_fields_and_modes_follow_from_the_settings() -> None:
    student = config(policy_distillation={"support": "student"})
    assert Field.CANDIDATE_LOGPROBS in needed_fields(student, "policy")
    assert Field.TOP not in needed_fields(student, "policy")
    assert needed_modes(config(policy_distillation={"thinking_prob": 1}), "policy") == {Mode.THINKING}
    mixed = config(non_policy_distillation={"modes": "mixed", "thinking_prob": 0})
    assert needed_modes(mixed, "non_policy") == {Mode.NON_THINKING}
    assert needed_modes(config(non_policy_distillation={"modes": "thinking"}), "non_policy") == {Mode.THINKING}
