"""What an engine must offer to the service, and the text side that goes with a model.

Arrays in, arrays out. A backend knows no transport, no queue of clients and no cache; it may assume that the service
has checked every id, length and limit. It batches what is submitted at the same time as it likes, never lets one
sequence's result depend on what else was in its batch beyond rounding, and stops work whose awaiting task is cancelled.
Legend: N tokens, T scored positions, K alternatives, P prompt tokens, R new tokens.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Protocol

from protos.head import Head
from protos.scores import (
    FinishReason,
    Floats,
    Ids,
    Limits,
    Message,
    Mode,
    Sampling,
    Scores,
    ScoreSpec,
    Sequence,
    TeacherInfo,
)
from teacher_server.backends.options import BackendOptions
from teacher_server.backends.steps import Observer


@dataclass(frozen=True, eq=False)
class Piece:
    """New tokens of one of a prompt's n completions: int32[R], float32[R] at temperature 1 or None, its end.

    `top_token_ids` int32[R,K] and `top_logprobs` float32[R,K] are the K most likely tokens at each, most likely first,
    or None where none are wanted.
    """

    sample_index: int
    token_ids: Ids
    logprobs: Floats | None = None
    finish_reason: FinishReason | None = None
    top_token_ids: Ids | None = None
    top_logprobs: Floats | None = None


@dataclass(frozen=True)
class Room:
    """How much generation an engine runs at a time.

    `tokens` are those of prompts and completions whose keys and values it keeps, `completions` the rows of a step.
    """

    tokens: int
    completions: int


def limits(options: BackendOptions, vocab_size: int, longest: int) -> Limits:
    """What a model of that vocabulary and of at most `longest` tokens accepts; any one sequence fits a call."""
    return Limits(
        sequence_tokens=longest,
        top_k=min(options.max_top_k, vocab_size),
        candidates=min(options.max_candidates, vocab_size),
        request_tokens=max(options.max_request_tokens, longest),
        sequences=options.max_sequences,
        temperatures=options.max_temperatures,
    )


class TextCodec(Protocol):
    """The tokenizer and the chat template of a teacher."""

    @property
    def think_ids(self) -> tuple[int, ...]:
        """Ids of the opening and the closing think tag; fewer than two where one is not a single token."""
        ...

    def encode(self, text: str, *, special: bool = False) -> Ids:
        """int32[N] of plain text; special tokens spelled out in `text` are recognised.

        `special` adds those that the tokenizer puts around a text, such as a first BOS; Qwen3's puts none.
        """
        ...

    def decode(self, token_ids: Ids, *, special: bool = False) -> str:
        """The text of int32[N]; special tokens are left out unless `special`, think tags are kept."""
        ...

    def pieces(self, token_ids: Ids) -> list[str]:
        """The vocabulary's own names of int32[N], each in the vocabulary."""
        ...

    def render(self, messages: tuple[Message, ...], mode: Mode | None, *, opening: bool = True) -> Ids:
        """int32[P] of a conversation and, where `opening`, the opening of the assistant's turn.

        ValueError where the template refuses.
        """
        ...


class Backend(Protocol):
    """An engine with one loaded model."""

    @property
    def info(self) -> TeacherInfo:
        """What GetTeacher answers; valid once `start` has returned."""
        ...

    @property
    def text(self) -> TextCodec:
        """The model's tokenizer and template; valid once `start` has returned."""
        ...

    @property
    def batch_tokens(self) -> int:
        """Tokens that one engine step takes; the service keeps about twice as many submitted, and no more."""
        ...

    @property
    def generation_room(self) -> Room:
        """What it generates at a time; the service keeps a little more submitted. Valid once `start` has returned."""
        ...

    @property
    def steps(self) -> int:
        """A number that grows with each step that the engine finishes; one that has work and does not grow it hangs."""
        ...

    def observe(self, observer: Observer) -> None:
        """Tells `observer` of each step that ends from now on, in whatever thread; see `steps.note` too."""
        ...

    async def start(self) -> None:
        """Loads the model and checks itself; raises ValueError for what the operator can mend, naming it."""
        ...

    async def score(self, sequence: Sequence, spec: ScoreSpec) -> Scores:
        """The scores of one sequence, every field that `spec.fields(...)` names; TeacherFailed where it cannot.

        Field.HIDDEN_STATES may only be in `info.fields` where the logits are exactly head @ state (+ bias), summed in
        float32. Its numbers are finite: nobody else looks at them.
        """
        ...

    def head(self, rows: int) -> AsyncIterator[Head]:
        """The LM head over the first `info.vocab_size` rows as parts of at most `rows` rows, in order.

        In the dtype that the model multiplies. Parts, because two copies of a whole one are gigabytes. Unsupported
        where Field.HIDDEN_STATES is not in `info.fields`.
        """
        ...

    def generate(
        self,
        prompt_ids: Ids,
        sampling: Sampling,
        *,
        n: int,
        logprobs: bool,
        stream: bool,
        mode: Mode | None,
        alternatives: int = 0,
        dropped: AbstractSet[int] = frozenset(),
    ) -> AsyncIterator[list[Piece]]:
        """The pieces of the n completions of int32[P]; where `stream` is False, one piece for each, at its end.

        `alternatives` (K) come with each token, for which `logprobs` are wanted too. `dropped` are the indexes of
        completions that nobody waits for any more: the caller adds to it meanwhile, and the engine ends these within a
        step; a piece of theirs that is on its way is not read. The iterator may then end without their last pieces.
        """
        ...

    async def healthy(self) -> bool:
        """Whether the engine still answers."""
        ...

    async def close(self) -> None:
        """Stops the engine and frees the model; calls in flight fail with Unavailable."""
        ...
