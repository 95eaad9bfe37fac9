"""Modes: how prompts are rendered in them, and which example gets which."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.scores import Message, Mode
from student_trainer.data import Example
from student_trainer.modes import assign_modes, pair_with_modes, render, render_all
from tests import tiny_qwen3

EXAMPLES = [Example(f"id{i}", (Message("user", str(i)),)) for i in range(400)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    folder: Path = tmp_path_factory.mktemp("tiny")
    tiny_qwen3.make(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_a_prompt_opens_the_assistants_turn_in_its_mode(tokenizer: Any) -> None:
    messages = (Message("system", "s"), Message("user", "1+1"))
    thinking, other = (render(tokenizer, messages, mode) for mode in (Mode.THINKING, Mode.NON_THINKING))
    assert thinking.dtype == other.dtype == np.int32
    text = tokenizer.decode(thinking)
    assert text.endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(other) == text + "<think>\n\n</think>\n\n"


def test_no_mode_is_the_templates_default(tokenizer: Any) -> None:
    messages = (Message("user", "1+1"),)
    assert render(tokenizer, messages, None).tolist() == render(tokenizer, messages, Mode.THINKING).tolist()


def test_many_conversations_are_rendered_as_one_is(tokenizer: Any) -> None:
    turns = [
        (Message("user", "1+1"),),
        (Message("system", "sé"), Message("user", "a longer one, 你好")),
        EXAMPLES[3].messages,
    ]
    pairs = [(messages, mode) for messages in turns for mode in (Mode.NON_THINKING, Mode.THINKING)]
    found = render_all(tokenizer, pairs)
    assert [ids.tolist() for ids in found] == [render(tokenizer, *pair).tolist() for pair in pairs]
    assert {ids.dtype for ids in found} == {np.dtype(np.int32)}
    assert render_all(tokenizer, []) == []


def test_the_server_renders_the_same(tokenizer: Any, tmp_path: Path) -> None:
    from teacher_server.backends.text import HuggingFaceText

    tiny_qwen3.make(tmp_path)
    text, messages = (
        HuggingFaceText(tmp_path),
        (Message("user", "1+1"), Message("assistant", "2"), Message("user", "é")),
    )
    for mode in Mode:
        assert text.render(messages, mode).tolist() == render(tokenizer, messages, mode).tolist()


@given(st.floats(0, 1), st.integers(0, 10))
def test_modes_follow_their_probability(probability: float, seed: int) -> None:
    modes = assign_modes(EXAMPLES, probability, seed)
    share = sum(m is Mode.THINKING for m in modes) / len(modes)
    assert abs(share - probability) < 0.12
    if probability in (0, 1):
        assert share == probability


def test_an_examples_mode_depends_on_the_seed_and_itself_alone() -> None:
    modes = assign_modes(EXAMPLES, 0.5, 1)
    assert assign_modes(EXAMPLES[::-1], 0.5, 1) == modes[::-1]
    assert assign_modes(EXAMPLES[7:9], 0.5, 1) == modes[7:9]
    assert assign_modes(EXAMPLES, 0.5, 2) != modes


def test_a_higher_probability_only_adds_thinking() -> None:
    few, many = assign_modes(EXAMPLES, 0.3, 1), assign_modes(EXAMPLES, 0.6, 1)
    assert all(b is Mode.THINKING for a, b in zip(few, many, strict=True) if a is Mode.THINKING)


def test_the_modes_setting_pairs_examples_with_modes() -> None:
    pairs = pair_with_modes(EXAMPLES[:2], "both", 0.5, 1)
    assert [(e.id, m) for e, m in pairs] == [(i, m) for i in ("id0", "id1") for m in Mode]
    assert [m for _, m in pair_with_modes(EXAMPLES[:2], "non_thinking", 0.5, 1)] == [Mode.NON_THINKING] * 2
    mixed = pair_with_modes(EXAMPLES, "mixed", 0.5, 1)
    assert [m for _, m in mixed] == assign_modes(EXAMPLES, 0.5, 1)
