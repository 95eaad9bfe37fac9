"""The hashes by which teacher and student compare tokenizers change with what matters and with nothing else."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from protos import tokenizer_hash as hashes

VOCABULARY = {"a": 0, "b": 1, "<|im_end|>": 2}


def test_the_order_of_entries_does_not_matter() -> None:
    backwards = dict(reversed(VOCABULARY.items()))
    assert hashes.tokenizer_hash(VOCABULARY, ["x", "y"]) == hashes.tokenizer_hash(backwards, ["y", "x", "x"])


def test_ids_tokens_and_special_tokens_matter() -> None:
    variants = [
        (VOCABULARY, ["<|im_end|>"]),
        (VOCABULARY, []),
        (VOCABULARY | {"a": 1, "b": 0}, ["<|im_end|>"]),
        (VOCABULARY | {"c": 3}, ["<|im_end|>"]),
    ]
    assert len({hashes.tokenizer_hash(*v) for v in variants}) == 4


def test_any_text_can_be_a_token() -> None:
    assert len(hashes.tokenizer_hash({"\ud800": 0, "é": 1}, ["é"])) == 64


@dataclass
class Token:
    """What transformers keeps for an added token."""

    content: str
    special: bool

    def __str__(self) -> str:
        return self.content


def tokenizer(**changes: Any) -> Any:
    added = {2: Token("<|im_end|>", True), 3: Token("t", False)}
    base: dict[str, Any] = {
        "get_vocab": lambda: VOCABULARY,
        "added_tokens_decoder": added,
        "eos_token": "a",
        "chat_template": "{{ x }}",
    }
    return SimpleNamespace(**(base | changes))


def test_which_token_ends_a_completion_does_not_matter() -> None:
    assert hashes.hash_of_tokenizer(tokenizer()) == hashes.hash_of_tokenizer(tokenizer(eos_token="b"))
    assert hashes.hash_of_tokenizer(tokenizer()) == hashes.tokenizer_hash(VOCABULARY, ["<|im_end|>"])


def test_templates_are_told_apart_and_none_is_empty() -> None:
    assert hashes.hash_of_template(tokenizer(chat_template=None)) == ""
    assert hashes.hash_of_template(tokenizer()) == hashes.template_hash("{{ x }}") != hashes.template_hash("{{ x}}")
    assert hashes.hash_of_template(
        tokenizer(chat_template={"default": "{{ x }}", "tool": "y"})
    ) == hashes.template_hash("{{ x }}")
