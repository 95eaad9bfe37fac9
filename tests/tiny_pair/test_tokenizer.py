"""The tokenizer: Qwen3's manners, any text, one rendering of a prompt."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny_pair.models import LOGITS_WIDTH
from tiny_pair.task import distinct_problems, user_content
from tiny_pair.tokenizer import (
    SPECIAL_TOKENS,
    THINK_TOKENS,
    WHOLE_WORDS,
    render_completion,
    render_prompt,
    save_tokenizer,
)

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


@settings(deadline=None, max_examples=50)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_survives_a_round_trip(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert max(ids, default=0) < len(tokenizer)


@pytest.mark.parametrize("piece", [*WHOLE_WORDS, *SPECIAL_TOKENS, *THINK_TOKENS])
def test_known_words_and_special_tokens_are_one_token_each(tokenizer: Any, piece: str) -> None:
    assert len(tokenizer(piece)["input_ids"]) == 1


def test_digits_are_single_tokens(tokenizer: Any) -> None:
    assert [tokenizer.decode([i]) for i in tokenizer("37+58=95\n")["input_ids"]] == list("37+58=95\n")


def test_padded_rows_exist_above_the_real_vocabulary(tokenizer: Any) -> None:
    assert len(tokenizer) < LOGITS_WIDTH


def test_end_of_turn_and_padding_are_qwen3s(tokenizer: Any) -> None:
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_decoding_without_special_tokens_keeps_the_think_block(tokenizer: Any) -> None:
    text = render_completion("1+1=2", "2", thinking=True)
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == "<think>\n1+1=2\n</think>\n\n2"


@pytest.mark.parametrize("thinking", [True, False])
def test_the_quick_rendering_of_a_prompt_is_the_templates(tokenizer: Any, thinking: bool) -> None:
    content = user_content("Calculate", "37+58-24")
    messages = [{"role": "user", "content": content}]
    options = {"tokenize": False, "add_generation_prompt": True}
    rendered = tokenizer.apply_chat_template(messages, enable_thinking=thinking, **options)
    assert rendered == render_prompt(content, thinking=thinking)
    assert tokenizer.apply_chat_template(messages, **options) == render_prompt(content, thinking=True)


def test_the_template_renders_system_turns_and_drops_old_thinking(tokenizer: Any) -> None:
    block = "<think>\nx\n</think>\n\n"
    old, new = {"role": "assistant", "content": block + "y"}, {"role": "user", "content": "b"}
    first = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}, old]
    kept = tokenizer.apply_chat_template(first, tokenize=False)
    assert kept == (
        f"<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n{block}y<|im_end|>\n"
    )
    dropped = tokenizer.apply_chat_template([*first, new], tokenize=False)
    assert dropped == kept.replace(block, "") + "<|im_start|>user\nb<|im_end|>\n"


def test_completions_fit_the_documented_lengths(tokenizer: Any) -> None:
    for thinking, longest in ((True, 48), (False, 8)):
        texts = [
            render_completion(p.thinking, p.answer, thinking=thinking) for p in distinct_problems(500, 0, held_out=True)
        ]
        assert max(len(ids) for ids in tokenizer(texts)["input_ids"]) <= longest


@pytest.mark.parametrize("role", ["teacher", "student_base"])
def test_the_committed_tokenizers_are_what_the_code_writes(tmp_path: Path, role: str) -> None:
    save_tokenizer(tmp_path)
    committed = Path(__file__).parents[2] / "tiny_pair" / role
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((committed / name).read_text()) == json.loads((tmp_path / name).read_text())
    assert (committed / "chat_template.jinja").read_text() == (tmp_path / "chat_template.jinja").read_text()
