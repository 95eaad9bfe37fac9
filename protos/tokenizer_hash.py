"""Hashes by which a teacher and a student tell whether they share tokenizer and chat template.

Both sides call these and neither imports the other, so the hashes live with the contract: the server puts them in
`TeacherInfo.tokenizer_hash` and `.template_hash`, the trainer's handshake compares them with the student's. Pure
Python; `hash_of_tokenizer` and `hash_of_template` only read attributes of the tokenizer object that they are given.

The tokenizer hash leaves out which of the special tokens is EOS or padding: a base model and its chat model share one
tokenizer and differ in these, and EOS ids are compared by themselves.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any


def tokenizer_hash(vocabulary: Mapping[str, int], special_tokens: Iterable[str]) -> str:
    """Hexadecimal SHA-256 over the sorted (token, id) pairs, added tokens included, and the sorted special tokens."""
    content = [sorted(vocabulary.items()), sorted(set(special_tokens))]
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode("ascii")).hexdigest()


def template_hash(template: str | None) -> str:
    """Hexadecimal SHA-256 of a chat template's text in UTF-8; empty where there is none."""
    return hashlib.sha256(template.encode("utf-8")).hexdigest() if template else ""


def hash_of_tokenizer(tokenizer: Any) -> str:
    """`tokenizer_hash` of a transformers tokenizer: special are the added tokens that are marked so."""
    special = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    return tokenizer_hash(tokenizer.get_vocab(), special)


def hash_of_template(tokenizer: Any) -> str:
    """`template_hash` of a transformers tokenizer; of several named templates the one called `default` counts."""
    template = getattr(tokenizer, "chat_template", None)
    return template_hash(template.get("default") if isinstance(template, dict) else template)
