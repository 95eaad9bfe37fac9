"""What every backend over a checkpoint says of it once it has started: description, text side, think tags.

Knows files' names and a tokenizer, no engine.
"""

from __future__ import annotations

import logging
from pathlib import Path

from protos.errors import Unsupported
from protos.scores import Sampling, TeacherInfo
from teacher_server.backends import model_files
from teacher_server.backends.options import BackendOptions
from teacher_server.backends.text import HuggingFaceText
from teacher_server.backends.thinking import CLOSING_TEXT, ThinkTags

_LOG = logging.getLogger(__name__)

DEFAULT_SEQUENCE_TOKENS = 32768
"""The longest sequence where the operator does not say."""


def longest_sequence(options: BackendOptions, known: int | None) -> int:
    """Tokens of the longest sequence; `known` is what the model's positions allow, or None."""
    wanted = options.max_sequence_tokens or DEFAULT_SEQUENCE_TOKENS
    longest = min(wanted, known) if known else wanted
    if options.max_sequence_tokens and longest < wanted:
        _LOG.warning("max_sequence_tokens is %d, but the model's positions end at %d", wanted, longest)
    return longest


class CheckpointFace:
    """`info` and `text` of a `base.Backend`, which `present` sets."""

    def __init__(self, options: BackendOptions) -> None:
        self._options = options
        self._info: TeacherInfo | None = None
        self._text: HuggingFaceText | None = None
        self._tags: ThinkTags | None = None

    @property
    def info(self) -> TeacherInfo:
        """What GetTeacher answers; RuntimeError before `start`."""
        if self._info is None:
            raise RuntimeError("start() has not returned yet")
        return self._info

    @property
    def text(self) -> HuggingFaceText:
        """The tokenizer and template; RuntimeError before `start`."""
        if self._text is None:
            raise RuntimeError("start() has not returned yet")
        return self._text

    def present(self, info: TeacherInfo, text: HuggingFaceText) -> None:
        """From now on the backend is described."""
        self._info, self._text = info, text
        self._tags = ThinkTags.of(text.think_ids, text.encode(CLOSING_TEXT))

    def make_text(self, folder: Path) -> HuggingFaceText:
        """The text side of a checkpoint; ValueError where there is none."""
        eos = model_files.generation_eos(folder)
        return HuggingFaceText(folder, trust_remote_code=self._options.trust_remote_code, eos=eos)

    def tags_for(self, sampling: Sampling) -> ThinkTags | None:
        """The tags; Unsupported where the sampling has a think budget and the tags are not single tokens."""
        if sampling.max_thinking_tokens and self._tags is None:
            raise Unsupported(
                "max_thinking_tokens needs <think> and </think> as single tokens; this tokenizer has none"
            )
        return self._tags
