"""The tokenizer and chat template of a transformers model as the service's text side.

Knows tokenizers, no weights and no engine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from jinja2.exceptions import TemplateError

from protos import tokenizer_hash as hashes
from protos.scores import Ids, Message, Mode, ids_array

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "*.tiktoken", "spiece.model", "tokenizer*.py")
_PROBE = [{"role": "user", "content": "1+1"}]


class HuggingFaceText:
    """A TextCodec over `AutoTokenizer`; see `base.TextCodec` for shapes.

    `folder` holds the tokenizer's files; ValueError where there is none that loads. `eos` are ids of
    generation_config beside the tokenizer's own end token.
    """

    def __init__(self, folder: Path, *, trust_remote_code: bool = False, eos: tuple[int, ...] = ()) -> None:
        from transformers import AutoTokenizer

        # Without these, transformers makes an empty tokenizer of the architecture's class instead of an error.
        if not any(found for pattern in _FILES for found in folder.glob(pattern)):
            raise ValueError(f"no tokenizer is in {folder}; put tokenizer.json and tokenizer_config.json there")
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ValueError(
                f"no tokenizer loads from {folder}: {error}; put tokenizer.json and tokenizer_config.json there"
            ) from error
        vocabulary: dict[str, int] = self._tokenizer.get_vocab()
        if not vocabulary:
            raise ValueError(f"the tokenizer in {folder} has no tokens")
        self.vocab_size = max(vocabulary.values()) + 1
        """Real tokens: the largest id plus one."""
        self.tokenizer_hash = hashes.hash_of_tokenizer(self._tokenizer)
        self.template_hash = hashes.hash_of_template(self._tokenizer)
        self.think_ids = tuple(vocabulary[tag] for tag in (THINK_OPEN, THINK_CLOSE) if tag in vocabulary)
        """Ids of the opening and the closing think tag; empty or shorter where one is not a single token."""
        special = {i for i, token in self._tokenizer.added_tokens_decoder.items() if token.special}
        hidden = (special | set(self._tokenizer.all_special_ids)) - set(self.think_ids)
        self._hidden = np.array(sorted(hidden), dtype=np.int32)
        own_end = self._tokenizer.eos_token_id
        self.eos_token_ids = tuple(sorted({*eos, *([] if own_end is None else [own_end])}))
        """Ids that end a completion: generation_config's and the tokenizer's."""
        self.modes: tuple[Mode, ...] = ()
        self.modes = self._find_modes()
        """Both modes where the template reacts to `enable_thinking`, else none."""

    def encode(self, text: str, *, special: bool = False) -> Ids:
        """int32[N]; see `base.TextCodec.encode`."""
        return ids_array(self._tokenizer.encode(text, add_special_tokens=special))

    def decode(self, token_ids: Ids, *, special: bool = False) -> str:
        """The text of int32[N]; see `base.TextCodec.decode`."""
        shown = token_ids if special else token_ids[~np.isin(token_ids, self._hidden)]
        return str(self._tokenizer.decode(shown, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def pieces(self, token_ids: Ids) -> list[str]:
        """Names of int32[N]; see `base.TextCodec.pieces`."""
        return list(self._tokenizer.convert_ids_to_tokens(token_ids.tolist()))

    def render(self, messages: tuple[Message, ...], mode: Mode | None, *, opening: bool = True) -> Ids:
        """int32[P]; see `base.TextCodec.render`. A mode that the template does not know is a ValueError."""
        if not self._template():
            raise ValueError("this teacher's tokenizer has no chat template; send token_ids or text, not messages")
        if mode is not None and mode not in self.modes:
            raise ValueError(f"this teacher's template does not know the mode {mode.value}; leave the mode unset")
        return ids_array(self._apply([{"role": m.role, "content": m.content} for m in messages], mode, opening))

    def _template(self) -> str:
        template = getattr(self._tokenizer, "chat_template", None)
        return str((template.get("default") if isinstance(template, dict) else template) or "")

    def _apply(self, turns: list[dict[str, str]], mode: Mode | None, opening: bool = True) -> list[int]:
        options = {"enable_thinking": mode is not Mode.NON_THINKING} if mode or self.modes else {}
        try:
            rendered: str = self._tokenizer.apply_chat_template(
                turns, add_generation_prompt=opening, tokenize=False, **options
            )
        except (TemplateError, TypeError, KeyError) as error:
            raise ValueError(f"the chat template refuses these messages: {error}") from error
        return list(self._tokenizer.encode(rendered, add_special_tokens=False))

    def _find_modes(self) -> tuple[Mode, ...]:
        if not self._template():
            return ()
        try:
            thinking, other = (self._apply(_PROBE, mode) for mode in (Mode.THINKING, Mode.NON_THINKING))
        except ValueError:
            return ()
        return () if thinking == other else (Mode.THINKING, Mode.NON_THINKING)
