"""The text side: a tokenizer of transformers, and the byte codec of the theoretical teacher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from protos.scores import Message, Mode
from teacher_server.backends.base import TextCodec
from teacher_server.backends.byte_text import ByteText
from teacher_server.backends.text import HuggingFaceText
from tests.teacher_server.backends.conftest import save_tokenizer

HI = (Message("system", "short"), Message("user", "hé"))


@pytest.fixture(params=["huggingface", "bytes"])
def codec(request: pytest.FixtureRequest, saved: Callable[[str], Path]) -> TextCodec:
    return ByteText() if request.param == "bytes" else HuggingFaceText(saved("qwen3"), eos=(256, 258))


def test_text_survives_a_round_trip(codec: TextCodec) -> None:
    text = "a \n  b, é 漢 🙂 <think>\nso\n</think>\n\n42 ."
    ids = codec.encode(text)
    assert ids.dtype == np.int32
    assert codec.decode(ids) == text
    assert len(codec.encode("")) == 0
    assert codec.decode(np.zeros(0, dtype=np.int32)) == ""


def test_special_tokens_are_recognised_and_left_out_of_text_but_think_tags_stay(codec: TextCodec) -> None:
    ids = codec.encode("<|im_start|>x<think>y</think><|im_end|><|endoftext|>")
    assert len(ids) == 7
    assert codec.decode(ids) == "x<think>y</think>"


def test_the_modes_render_differently_and_none_means_thinking(codec: TextCodec) -> None:
    thinking, other, default = (codec.render(HI, m) for m in (Mode.THINKING, Mode.NON_THINKING, None))
    assert np.array_equal(thinking, default)
    assert codec.decode(other) == codec.decode(thinking) + "<think>\n\n</think>\n\n"
    assert "hé" in codec.decode(thinking)


def test_a_conversation_that_the_template_refuses_is_a_value_error(codec: TextCodec) -> None:
    with pytest.raises(ValueError, match="template refuses"):
        codec.render((Message("bad", "x"),), None)


def test_a_tokenizer_says_what_the_server_needs_to_know(saved: Callable[[str], Path]) -> None:
    text = HuggingFaceText(saved("qwen3"), eos=(256,))
    assert text.vocab_size == 261
    assert text.eos_token_ids == (256, 258)
    assert text.modes == (Mode.THINKING, Mode.NON_THINKING)
    assert text.think_ids == (259, 260)


def test_a_template_without_modes_and_no_template_are_told_apart(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "plain", "{% for m in messages %}{{ m.content }}{% endfor %}")
    plain = HuggingFaceText(tmp_path / "plain")
    assert plain.modes == ()
    assert plain.decode(plain.render(HI, None)) == "shorthé"
    with pytest.raises(ValueError, match="does not know the mode"):
        plain.render(HI, Mode.THINKING)
    save_tokenizer(tmp_path / "none", None)
    none = HuggingFaceText(tmp_path / "none")
    assert (none.modes, none.template_hash) == ((), "")
    with pytest.raises(ValueError, match="no chat template"):
        none.render(HI, None)
