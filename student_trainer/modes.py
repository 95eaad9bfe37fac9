"""Qwen3's two modes: which example is answered in which, and how a conversation becomes tokens in one.

It knows tokenizers by their chat template alone, and no model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np

from protos.scores import Ids, Message, Mode
from student_trainer.data import Example

ModeChoice = Literal["both", "thinking", "non_thinking", "mixed"]


def render(tokenizer: Any, messages: Iterable[Message], mode: Mode | None) -> Ids:
    """int32[P] of a conversation and the opening of the assistant's turn in `mode` (None: the template's default).

    `tokenizer` is a transformers tokenizer. The non-thinking mode's empty think block is part of the prompt, where the
    template writes one.
    """
    options = {} if mode is None else {"enable_thinking": mode.thinking}
    text = tokenizer.apply_chat_template(_turns(messages), tokenize=False, add_generation_prompt=True, **options)
    return np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)


def render_all(tokenizer: Any, pairs: Sequence[tuple[Sequence[Message], Mode]]) -> list[Ids]:
    """`render` of many conversations, each in its mode; a fast tokenizer reads them together, in half of the time."""
    texts = [""] * len(pairs)
    for mode in Mode:
        places = [place for place, (_, own) in enumerate(pairs) if own is mode]
        turns = [_turns(pairs[place][0]) for place in places]
        options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": mode.thinking}
        for place, text in zip(places, tokenizer.apply_chat_template(turns, **options) if turns else (), strict=True):
            texts[place] = text
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None or fast.truncation is not None or fast.padding is not None:
        rows = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    else:
        rows = [encoding.ids for encoding in fast.encode_batch_fast(texts, add_special_tokens=False)]
    return [np.asarray(row, dtype=np.int32) for row in rows]


def _turns(messages: Iterable[Message]) -> list[dict[str, str]]:
    """A conversation as templates take it."""
    return [{"role": m.role, "content": m.content} for m in messages]


def prompt_tokens(tokenizer: Any, messages: Iterable[Message]) -> int:
    """How many tokens a prompt has, in the mode in which it is longer."""
    turns = list(messages)
    return max(len(render(tokenizer, turns, mode)) for mode in Mode)


def unit_interval(seed: int, text: str) -> float:
    """A number of [0, 1) that depends on seed and text alone: the same on every machine and in any order."""
    digest = hashlib.sha256(f"{seed}\n{text}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def assign_modes(examples: Iterable[Example], thinking_prob: float, seed: int) -> list[Mode]:
    """One mode for each example, thinking with probability `thinking_prob`; independent of the others and their order.

    Another seed (a stage adds its epoch) draws anew.
    """
    thinking = (unit_interval(seed, f"mode {example.id}") < thinking_prob for example in examples)
    return [Mode.THINKING if yes else Mode.NON_THINKING for yes in thinking]


def pair_with_modes(
    examples: Sequence[Example], choice: ModeChoice, thinking_prob: float, seed: int
) -> list[tuple[Example, Mode]]:
    """Each example with the modes that it is to be answered in: stage 1's `modes` setting. Examples stay in order."""
    if choice == "mixed":
        return list(zip(examples, assign_modes(examples, thinking_prob, seed), strict=True))
    modes = tuple(Mode) if choice == "both" else (Mode(choice),)
    return [(example, mode) for example in examples for mode in modes]
