"""A text codec of bytes with a trivial chat template that knows both modes; needs no tokenizer and no file."""

from __future__ import annotations

import re

import numpy as np

from protos.scores import Ids, Message, Mode, ids_array
from protos.tokenizer_hash import template_hash, tokenizer_hash

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
THINK = ("<think>", "</think>")
_IDS = {tag: 256 + i for i, tag in enumerate((*SPECIAL, *THINK))}
_SPLIT = re.compile("(" + "|".join(re.escape(tag) for tag in _IDS) + ")")
_TEMPLATE = (
    "<|im_start|>ROLE\nCONTENT<|im_end|>\n ... <|im_start|>assistant\n, then in NON_THINKING <think>\n\n</think>\n\n"
)
_ROLES = ("system", "user", "assistant", "tool")


class ByteText:
    """Ids 0 to 255 are bytes, then come the tags of ChatML and of thinking; see `base.TextCodec`."""

    vocab_size = 256 + len(_IDS)
    eos_token_ids = (_IDS["<|endoftext|>"], _IDS["<|im_end|>"])
    think_ids = think_open, think_close = tuple(_IDS[tag] for tag in THINK)
    modes = (Mode.THINKING, Mode.NON_THINKING)
    tokenizer_hash = tokenizer_hash({**{f"<0x{i:02X}>": i for i in range(256)}, **_IDS}, SPECIAL)
    template_hash = template_hash(_TEMPLATE)

    def encode(self, text: str, *, special: bool = False) -> Ids:
        """int32[N] of text; tags spelled out become their ids. There are no special tokens to add."""
        parts = (part for part in _SPLIT.split(text) if part)
        return ids_array([i for part in parts for i in ([_IDS[part]] if part in _IDS else part.encode("utf-8"))])

    def decode(self, token_ids: Ids, *, special: bool = False) -> str:
        """The text of int32[N]; broken UTF-8 becomes U+FFFD, special tokens vanish or are shown, think tags stay."""
        tags = _ALL if special else _SHOWN
        pieces = (bytes([i]) if i < 256 else tags.get(int(i), b"") for i in np.asarray(token_ids).tolist())
        return b"".join(pieces).decode("utf-8", errors="replace")

    def pieces(self, token_ids: Ids) -> list[str]:
        """The vocabulary's names of int32[N]."""
        return [f"<0x{i:02X}>" if i < 256 else _ALL[i].decode() for i in np.asarray(token_ids).tolist()]

    def render(self, messages: tuple[Message, ...], mode: Mode | None, *, opening: bool = True) -> Ids:
        """int32[P] of a conversation; ValueError for a role that ChatML does not have."""
        for message in messages:
            if message.role not in _ROLES:
                raise ValueError(f"the template refuses the role {message.role!r}; use one of {', '.join(_ROLES)}")
        turns = "".join(f"<|im_start|>{m.role}\n{m.content}<|im_end|>\n" for m in messages)
        closed = "<think>\n\n</think>\n\n" if mode is Mode.NON_THINKING else ""
        return self.encode(f"{turns}<|im_start|>assistant\n{closed}" if opening else turns)


_ALL = {i: tag.encode() for tag, i in _IDS.items()}
_SHOWN = {_IDS[tag]: tag.encode() for tag in THINK}
