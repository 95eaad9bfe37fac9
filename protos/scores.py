"""Domain types of the contract: what a teacher is, what can be asked, what comes back.

Frozen dataclasses over numpy arrays, each checked for dtype and shape when it is made. They know no transport, no
engine and no message. Legend: N tokens of a sequence, T scored positions, K alternatives, C candidates,
M temperatures, H hidden size, P tokens of a prompt, R new tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
Bits = npt.NDArray[Any]
"""Numbers in a dtype that is named elsewhere: uint16 bits of bfloat16 or float16, or float32."""

BITS: dict[str, type[np.uint16] | type[np.float32]] = {
    "bfloat16": np.uint16,
    "float16": np.uint16,
    "float32": np.float32,
}
"""What holds the numbers of each dtype that hidden states and heads come in."""

TAIL_FLOOR = -100.0
"""Log-mass in nats below which a tail counts as empty."""


class Mode(Enum):
    """One of Qwen3's two ways to answer, a property of one prompt."""

    THINKING = "thinking"
    NON_THINKING = "non_thinking"

    @property
    def thinking(self) -> bool:
        """What a chat template calls `enable_thinking`."""
        return self is Mode.THINKING


class Field(Enum):
    """One array of a score; the names are the contract's."""

    TOKEN_LOGPROBS = "token_logprobs"
    TOP = "top"
    CANDIDATE_LOGPROBS = "candidate_logprobs"
    LOG_NORMALIZER = "log_normalizer"
    TAIL_LOGPROB = "tail_logprob"
    HIDDEN_STATES = "hidden_states"


class FinishReason(Enum):
    """Why a completion ended: `STOP` with a stop id as its last token or a stop string in its text, else `LENGTH`."""

    STOP = "stop"
    LENGTH = "length"


def ids_array(values: Iterable[int] | npt.ArrayLike, ndim: int = 1) -> Ids:
    """A contiguous int32[...] of `values`; ValueError where they are not whole numbers of int32's range."""
    array = np.asarray(values)
    if array.size == 0:
        array = array.reshape((0,) * ndim if array.ndim != ndim else array.shape).astype(np.int32)
    if array.ndim != ndim or array.dtype.kind not in "iu":
        raise ValueError(
            f"token ids must be whole numbers in {ndim} dimension(s), got {array.dtype}{list(array.shape)}"
        )
    if array.size and (int(array.min()) < -(2**31) or int(array.max()) >= 2**31):
        raise ValueError("token ids must fit int32")
    return np.ascontiguousarray(array, dtype=np.int32)


@dataclass(frozen=True)
class Limits:
    """The largest numbers that one request may carry; see `Limits` in teacher.proto."""

    sequence_tokens: int
    top_k: int
    candidates: int
    request_tokens: int
    sequences: int
    temperatures: int = 8


@dataclass(frozen=True)
class TeacherInfo:
    """What `GetTeacher` answers.

    `vocab_size` counts real tokens; `normalized_size` is the number of logits that probabilities are normalised over.
    `fingerprint` changes with weights, tokenizer, template, dtype, quantisation and engine. `hidden_size` and
    `hidden_dtype` (one of BITS) are those of HIDDEN_STATES; 0 and empty where they are not offered.
    """

    name: str
    fingerprint: str
    tokenizer_hash: str
    template_hash: str
    vocab_size: int
    normalized_size: int
    eos_token_ids: tuple[int, ...]
    limits: Limits
    modes: tuple[Mode, ...]
    fields: frozenset[Field]
    can_generate: bool
    engine: str
    dtype: str
    quantization: str
    hidden_size: int = 0
    hidden_dtype: str = ""


@dataclass(frozen=True, eq=False)
class Sequence:
    """One sequence to score.

    `token_ids` int32[N]; positions `score_start`..N-1 are scored, so T = N - score_start; `candidate_ids` int32[T,C] or
    None. Whether ids lie in a vocabulary is for the server to say; shapes are checked here (ValueError).
    """

    token_ids: Ids
    score_start: int = 1
    candidate_ids: Ids | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_ids", ids_array(self.token_ids))
        n = len(self.token_ids)
        if n < 2:
            raise ValueError(f"a sequence needs at least 2 tokens to score one, got {n}")
        if not 1 <= self.score_start < n:
            raise ValueError(f"score_start must be from 1 to {n - 1} for {n} tokens, got {self.score_start}")
        if self.candidate_ids is not None:
            candidates = ids_array(self.candidate_ids, 2)
            if candidates.shape[0] != self.positions:
                raise ValueError(f"candidate_ids has {candidates.shape[0]} rows, {self.positions} positions are scored")
            object.__setattr__(self, "candidate_ids", candidates if candidates.shape[1] else None)

    @property
    def positions(self) -> int:
        """T, the number of scored positions."""
        return len(self.token_ids) - self.score_start

    @property
    def candidates(self) -> int:
        """C, the number of candidates at each position."""
        return 0 if self.candidate_ids is None else int(self.candidate_ids.shape[1])


@dataclass(frozen=True)
class ScoreSpec:
    """How every sequence of a call is scored.

    `temperatures` (each > 0 and finite) are those of `log_normalizer` and `tail_logprob`. `want` empty means every
    field that the request has arguments for: token log-probabilities and log-normaliser always, the top and the tail
    where `top_k` > 0, candidates where the sequence names some; hidden states come only where `want` names them.
    """

    top_k: int = 0
    temperatures: tuple[float, ...] = (1.0,)
    want: frozenset[Field] = frozenset()

    def __post_init__(self) -> None:
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0, got {self.top_k}")
        if not self.temperatures:
            object.__setattr__(self, "temperatures", (1.0,))
        for t in self.temperatures:
            if not (np.isfinite(t) and t > 0):
                raise ValueError(f"temperatures must be finite and above 0, got {t}")
        if self.top_k == 0 and self.want & {Field.TOP, Field.TAIL_LOGPROB}:
            raise ValueError("top and tail_logprob are wanted but top_k is 0; ask for a top_k of at least 1")

    def fields(self, candidates: int) -> frozenset[Field]:
        """The fields that a sequence with that many candidates gets."""
        if self.want:
            return self.want
        chosen = {Field.TOKEN_LOGPROBS, Field.LOG_NORMALIZER}
        if self.top_k:
            chosen |= {Field.TOP, Field.TAIL_LOGPROB}
        if candidates:
            chosen |= {Field.CANDIDATE_LOGPROBS}
        return frozenset(chosen)


@dataclass(frozen=True)
class ScoreRequest:
    """A call of Score: sequences, one specification, and the fingerprint that the client expects ("" is any)."""

    sequences: tuple[Sequence, ...]
    spec: ScoreSpec = field(default_factory=ScoreSpec)
    fingerprint: str = ""

    @property
    def tokens(self) -> int:
        """Tokens in all sequences."""
        return sum(len(s.token_ids) for s in self.sequences)


@dataclass(frozen=True, eq=False)
class Scores:
    """The scores of T positions of one sequence; a field that was not wanted is None.

    `token_logprobs` float32[T]; `top_token_ids` int32[T,K] and `top_logprobs` float32[T,K], most likely first;
    `candidate_logprobs` float32[T,C]; `log_normalizer` float32[T,M]; `tail_logprob` float32[T,M], at least -100;
    `hidden_states` [T,H] float32 or uint16 bits, in the teacher's `hidden_dtype`. Log-probabilities are nats at
    temperature 1; log-normaliser and tail are at the M requested temperatures. All finite.
    """

    token_logprobs: Floats | None = None
    top_token_ids: Ids | None = None
    top_logprobs: Floats | None = None
    candidate_logprobs: Floats | None = None
    log_normalizer: Floats | None = None
    tail_logprob: Floats | None = None
    hidden_states: Bits | None = None

    def __post_init__(self) -> None:
        rows = set()
        for name, array in self.arrays().items():
            want: type[np.generic] = np.int32 if name == "top_token_ids" else np.float32
            if name == "hidden_states" and array.dtype == np.uint16:
                want = np.uint16
            if array.dtype != want or array.ndim != (1 if name == "token_logprobs" else 2):
                raise ValueError(f"{name} must be {np.dtype(want).name}[T{'' if name == 'token_logprobs' else ',..'}]")
            rows.add(array.shape[0])
        if len(rows) > 1:
            raise ValueError(f"the fields of one score have different numbers of rows: {sorted(rows)}")
        if (self.top_token_ids is None) != (self.top_logprobs is None):
            raise ValueError("top_token_ids and top_logprobs come together")

    def arrays(self) -> dict[str, Any]:
        """The arrays that are there, by field name."""
        pairs = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {name: array for name, array in pairs if array is not None}

    @property
    def positions(self) -> int:
        """T, the number of rows; 0 for a score without fields."""
        return next((int(a.shape[0]) for a in self.arrays().values()), 0)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(int(a.nbytes) for a in self.arrays().values())

    def rows(self, first: int, last: int) -> Scores:
        """Rows first..last-1, without copying."""
        return Scores(**{name: array[first:last] for name, array in self.arrays().items()})

    @staticmethod
    def join(parts: list[Scores]) -> Scores:
        """Consecutive parts of one sequence as one score."""
        if len(parts) == 1:
            return parts[0]
        names = parts[0].arrays().keys()
        return Scores(**{name: np.concatenate([getattr(p, name) for p in parts]) for name in names})

    def finite(self) -> bool:
        """Whether every number is finite; a teacher that gave another one has failed.

        Hidden states are left out: they are large, bits here, and looked at by the engine that computed them.
        """
        passed = ("top_token_ids", "hidden_states")
        return all(bool(np.isfinite(a).all()) for n, a in self.arrays().items() if n not in passed)


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, eq=False)
class Prompt:
    """What a completion continues: exactly one of `messages`, `token_ids` int32[P] and `text`, in one mode.

    `mode` None means thinking where the teacher knows modes. Only `messages` are rendered by the template.
    """

    messages: tuple[Message, ...] = ()
    token_ids: Ids | None = None
    text: str = ""
    mode: Mode | None = None

    def __post_init__(self) -> None:
        if self.token_ids is not None:
            object.__setattr__(self, "token_ids", ids_array(self.token_ids))
        given = [bool(self.messages), self.token_ids is not None and len(self.token_ids) > 0, bool(self.text)]
        if sum(given) != 1:
            raise ValueError(f"a prompt needs exactly one of messages, token_ids and text, got {sum(given)}")


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; see `Sampling` in teacher.proto. Temperature 0 is greedy, `top_k` 0 keeps all."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    ignore_eos: bool = False
    max_thinking_tokens: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not (np.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be finite and at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.top_k < 0 or self.max_thinking_tokens < 0:
            raise ValueError("top_k and max_thinking_tokens must be at least 0")


@dataclass(frozen=True)
class TextRules:
    """How OpenAI's routes want a completion's text; Generate has no such rules: there it is the text of all tokens.

    `stop` are strings that end a completion where they come up; they, or the text of a stop id, are left out of the
    text unless `show_stop`. `reasoning_apart` keeps what stands between think tags, and the tags, out of the text.
    """

    stop: tuple[str, ...] = ()
    show_stop: bool = False
    reasoning_apart: bool = False

    def __post_init__(self) -> None:
        if not all(self.stop):
            raise ValueError("a stop string is empty, and would end every completion before it begins")


@dataclass(frozen=True)
class GenerateRequest:
    """A call of Generate: prompts, each completed `n` times.

    `alternatives` of the most likely tokens come with each token where `logprobs` are wanted. These and `rules` are
    for callers in the server: the contract's messages do not carry them.
    """

    prompts: tuple[Prompt, ...]
    sampling: Sampling
    n: int = 1
    logprobs: bool = False
    stream: bool = False
    fingerprint: str = ""
    alternatives: int = 0
    rules: TextRules | None = None

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n must be at least 1, got {self.n}")
        if self.alternatives < 0 or (self.alternatives and not self.logprobs):
            raise ValueError(f"alternatives must be at least 0 and need logprobs, got {self.alternatives}")


@dataclass(frozen=True, eq=False)
class CompletionDelta:
    """What one completion gained: `token_ids` int32[R], `logprobs` float32[R] at temperature 1 or None, text.

    `finish_reason` is None while it grows; `prompt_token_ids` int32[P] comes with a completion's first delta.
    `top_token_ids` int32[R,K] and `top_logprobs` float32[R,K] are there where K alternatives were asked for.
    Under TextRules `reasoning` is the text of `reasoning_tokens` that stand between think tags, and `stop` is the stop
    string that ended it.
    """

    prompt_index: int
    sample_index: int
    token_ids: Ids
    logprobs: Floats | None = None
    text: str = ""
    finish_reason: FinishReason | None = None
    prompt_token_ids: Ids | None = None
    top_token_ids: Ids | None = None
    top_logprobs: Floats | None = None
    reasoning: str = ""
    reasoning_tokens: int = 0
    stop: str = ""


@dataclass(frozen=True, eq=False)
class Completion:
    """A finished completion: prompt int32[P], tokens int32[R] with a stop id last where one stopped it, float32[R].

    See CompletionDelta for the rest.
    """

    prompt_token_ids: Ids
    token_ids: Ids
    text: str
    finish_reason: FinishReason
    logprobs: Floats | None = None
    top_token_ids: Ids | None = None
    top_logprobs: Floats | None = None
    reasoning: str = ""
    reasoning_tokens: int = 0
    stop: str = ""
