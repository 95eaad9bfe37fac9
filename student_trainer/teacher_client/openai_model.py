"""What whoever connects to a stock server knows of its model: such a server cannot be asked for it.

A student of the teacher's family shares the tokenizer, so the student's own files say most of it. Plain data and two
functions; no torch, no transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from protos.scores import Mode


@dataclass(frozen=True)
class StockModel:
    """The model as it is expected to be; the handshake compares what can be compared.

    `vocab_size` real tokens; `normalized_size` the number of logits that the server softmaxes, None where it has to
    be asked or taken to be `logits_width`, the model's own padded number. `encode` gives a text's token ids without
    special ones added, `decode` the text of ids, with or without special tokens. `served` is the name of the model
    at the server; "" takes its only one.
    """

    vocab_size: int
    logits_width: int
    eos_token_ids: tuple[int, ...]
    tokenizer_hash: str
    template_hash: str
    modes: tuple[Mode, ...]
    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int], bool], str]
    """(ids, whether special tokens are left out) -> text."""
    served: str = ""
    normalized_size: int | None = None
