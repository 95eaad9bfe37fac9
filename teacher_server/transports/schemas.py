"""JSON for people: the models of HTTP's bodies, with the examples that OpenAPI shows, and their domain objects.

They say the same as teacher.proto, with lists for arrays, names for enums and text where that is handier. They know no
route and no engine. Legend: N tokens, T scored positions, K alternatives, C candidates, M temperatures.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, FailFast, Field, model_validator

from protos import scores as domain
from protos.errors import InvalidSequence, InvalidSpec

Id = Annotated[int, Field(ge=0, lt=2**31)]


class First(FailFast):
    """A list's first wrong item is enough; hashable, as members of a union must be."""

    __hash__ = object.__hash__


FIRST = First()
Ids = Annotated[list[int], FIRST]
"""Token ids; the first wrong one is enough to refuse them."""
MEMBERS = 256
"""Members of an object of a body."""
BLOCK = 4096
"""Numbers that are written as JSON at a time: the interpreter's lock is held meanwhile."""
NAMED = 20
"""Alternatives at a position whose texts are given too."""
Tokenize = Callable[[int, domain.Prompt], domain.Ids]
"""Tokens of a prompt, as TeacherService.tokenize gives them."""


class Body(BaseModel):
    """Base of all bodies: unknown members are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _few_members(cls, values: Any) -> Any:
        """Refuses a heap of unknown members at once: pydantic makes an error of each, which takes seconds."""
        if isinstance(values, dict) and len(values) > MEMBERS:
            raise ValueError(f"an object has {len(values)} members, and none of this API has more than {MEMBERS}")
        return values


class MessageBody(Body):
    """One turn of a conversation."""

    role: str
    """Speaker: system, user, assistant or tool."""
    content: str
    """Text of the turn."""


class PromptBody(Body):
    """What a completion continues: exactly one of messages, token_ids and text."""

    messages: Annotated[list[MessageBody], FIRST] = []
    """Turns of a conversation, rendered by the teacher's template in the prompt's mode."""
    token_ids: Ids = []
    """Tokens, used as they are."""
    text: str = ""
    """Plain text, tokenized without a template."""
    mode: domain.Mode | None = None
    """thinking or non_thinking; left out means thinking where the teacher knows both."""

    def prompt(self, index: int) -> domain.Prompt:
        """The domain's prompt; InvalidSequence with its index."""
        turns = tuple(domain.Message(m.role, m.content) for m in self.messages)
        try:
            ids = domain.ids_array(self.token_ids) if self.token_ids else None
            return domain.Prompt(turns, ids, self.text, self.mode)
        except (ValueError, OverflowError) as error:
            raise InvalidSequence(f"prompt {index}: {error}", index=index) from error


class SequenceBody(PromptBody):
    """A sequence to score: tokens or text, optionally followed by a completion, which alone is then scored."""

    completion: str = ""
    """Text after the prompt; scoring starts at its first token unless score_start says otherwise."""
    completion_token_ids: Ids = []
    """Tokens after the prompt, in place of text."""
    score_start: int | None = Field(default=None, ge=1)
    """First position to score; left out means 1, or the completion's first token."""
    candidate_ids: Annotated[list[Ids], FIRST] = []
    """T lists of C ids whose log-probabilities are wanted at each scored position."""

    def sequence(self, index: int, tokenize: Tokenize) -> domain.Sequence:
        """The domain's sequence; InvalidSequence with its index."""
        try:
            ids, start = tokenize(index, self.prompt(index)), 1
            if self.completion and self.completion_token_ids:
                raise ValueError("give completion or completion_token_ids, not both")
            more = domain.ids_array(self.completion_token_ids)
            if self.completion:
                more = tokenize(index, domain.Prompt(text=self.completion))
            if len(more):
                ids, start = np.concatenate([ids, more]), len(ids)
            if self.candidate_ids and len({len(row) for row in self.candidate_ids}) > 1:
                raise ValueError("candidate_ids must have as many ids in every row")
            candidates = domain.ids_array(self.candidate_ids, 2) if self.candidate_ids else None
            return domain.Sequence(ids, self.score_start or start, candidates)
        except (ValueError, OverflowError) as error:
            raise InvalidSequence(f"sequence {index}: {error}", index=index) from error


class ScoreBody(Body):
    """A call of Score."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"sequences": ["12 + 30 = 42"], "top_k": 3},
                {
                    "sequences": [{"messages": [{"role": "user", "content": "12 + 30 = ?"}], "completion": "42"}],
                    "temperatures": [1.0, 2.0],
                },
                {"sequences": [{"token_ids": [5, 17, 29, 8], "score_start": 2, "candidate_ids": [[1, 2], [3, 4]]}]},
            ]
        }
    )
    sequences: Annotated[list[str | Ids | SequenceBody], FIRST] = Field(min_length=1)
    """Sequences: plain text, a list of token ids, or an object that says more."""
    top_k: int = Field(default=0, ge=0)
    """K, the number of alternatives to return at each position."""
    temperatures: Annotated[list[float], FIRST] = []
    """Temperatures of log_normalizer and tail_logprob; empty means 1 alone."""
    want: Annotated[list[domain.Field], FIRST] = []
    """Fields to return; empty means all that the call has arguments for. hidden_states come as protobuf only."""
    fingerprint: str = ""
    """Fingerprint that you expect; empty means any."""

    def request(self, tokenize: Tokenize) -> domain.ScoreRequest:
        """The domain's call; InvalidSpec, or InvalidSequence with an index."""
        try:
            spec = domain.ScoreSpec(self.top_k, tuple(self.temperatures), frozenset(self.want))
        except ValueError as error:
            raise InvalidSpec(str(error)) from error
        bodies = [
            SequenceBody(**_shorthand(one)) if not isinstance(one, SequenceBody) else one for one in self.sequences
        ]
        sequences = tuple(body.sequence(index, tokenize) for index, body in enumerate(bodies))
        return domain.ScoreRequest(sequences, spec, self.fingerprint)


class ScoredSequence(BaseModel):
    """The scores of one sequence; fields that were not wanted are left out."""

    index: int
    score_start: int
    token_ids: list[int]
    """All N tokens of the sequence."""
    tokens: list[str]
    """Text of each of them."""
    token_logprobs: list[float] | None = None
    """[T]: of the tokens that stand there, in nats."""
    top_token_ids: list[list[int]] | None = None
    """[T,K]: most likely first."""
    top_logprobs: list[list[float]] | None = None
    """[T,K]: their log-probabilities."""
    top_tokens: list[list[str]] | None = None
    """[T,K]: text of each of them, where K is at most 20."""
    candidate_logprobs: list[list[float]] | None = None
    """[T,C]: of the candidates, in your order."""
    log_normalizer: list[list[float]] | None = None
    """[T,M]: C_T = log sum_v p(v)^(1/T), so that log q_T(i) = l_i / T - C_T."""
    tail_logprob: list[list[float]] | None = None
    """[T,M]: log of the mass outside the top K, floored at -100."""


class ScoreAnswer(BaseModel):
    """What a call of Score gives."""

    fingerprint: str
    sequences: list[ScoredSequence]


def answer_numbers(request: domain.ScoreRequest) -> int:
    """How many numbers the answer to a call has: for each position one, K ids and log-probabilities, C, and M twice."""
    spec = request.spec
    each = 1 + 2 * spec.top_k + 2 * len(spec.temperatures)
    return sum(len(one.token_ids) + one.positions * (each + one.candidates) for one in request.sequences)


def scored(sequence: domain.Sequence, index: int, scores: domain.Scores, text: Callable[[domain.Ids], str]) -> str:
    """ScoredSequence as JSON, made block by block, so that a thread that makes it lets others run."""
    ids = sequence.token_ids
    tokens = [text(ids[t : t + 1]) for t in range(len(ids))]
    head = json.dumps({"index": index, "score_start": sequence.score_start})[1:-1]
    members = [head, f'"token_ids": {_blocks(ids)}', f'"tokens": {_blocks(tokens)}']
    members += [f'"{name}": {_blocks(array)}' for name, array in scores.arrays().items()]
    top = scores.top_token_ids
    if top is not None and top.shape[1] <= NAMED:
        names = {int(i): text(np.array([i], dtype=np.int32)) for i in np.unique(top)}
        members.append(f'"top_tokens": {_blocks([[names[i] for i in row] for row in top.tolist()])}')
    return "{" + ", ".join(members) + "}"


def _blocks(rows: Any) -> str:
    """A list or an array as JSON."""
    step = max(1, BLOCK // (rows.shape[1] or 1)) if getattr(rows, "ndim", 1) > 1 else BLOCK
    parts = (rows[first : first + step] for first in range(0, len(rows), step))
    texts = (json.dumps(part if isinstance(part, list) else part.tolist(), allow_nan=False)[1:-1] for part in parts)
    return "[" + ", ".join(texts) + "]"


class SamplingBody(Body):
    """How tokens are drawn."""

    max_tokens: int = Field(default=256, ge=1)
    """Largest number of tokens of one completion."""
    temperature: float = Field(default=1.0, ge=0)
    """0 is greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """The smallest set of tokens with at least this mass is kept."""
    top_k: int = Field(default=0, ge=0)
    """Number of most likely tokens to keep; 0 keeps all."""
    stop_token_ids: Annotated[list[Id], FIRST] = []
    """Ids that end a completion beside the model's own."""
    seed: int | None = Field(default=None, ge=0, lt=2**64)
    """Equal calls with equal seeds give equal completions on one engine."""
    ignore_eos: bool = False
    """Let EOS ids be sampled without ending the completion."""
    max_thinking_tokens: int = Field(default=0, ge=0)
    """Largest number of tokens of the think block; 0 means no budget."""

    def sampling(self) -> domain.Sampling:
        """The domain's sampling; InvalidSpec."""
        try:
            return domain.Sampling(**self.model_dump() | {"stop_token_ids": tuple(self.stop_token_ids)})
        except ValueError as error:
            raise InvalidSpec(str(error)) from error


class GenerateBody(Body):
    """A call of Generate."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "prompts": [{"messages": [{"role": "user", "content": "12 + 30 = ?"}], "mode": "non_thinking"}],
                    "sampling": {"max_tokens": 64, "temperature": 0},
                },
                {"prompts": ["12 + 30 ="], "n": 2, "stream": True},
            ]
        }
    )
    prompts: Annotated[list[str | Ids | PromptBody], FIRST] = Field(min_length=1)
    """Prompts: plain text, a list of token ids, or an object that says more."""
    sampling: SamplingBody = SamplingBody()
    """How tokens are drawn."""
    n: int = Field(default=1, ge=1)
    """Number of completions of each prompt."""
    logprobs: bool = False
    """Return the log-probability of every sampled token, at temperature 1."""
    stream: bool = False
    """Answer with server-sent events as tokens are sampled; each has {"deltas": [...]}, the last is `event: done`."""
    fingerprint: str = ""
    """Fingerprint that you expect; empty means any."""

    def request(self) -> domain.GenerateRequest:
        """The domain's call; InvalidSpec, or InvalidSequence with an index."""
        bodies = [one if isinstance(one, PromptBody) else PromptBody(**_shorthand(one)) for one in self.prompts]
        prompts = tuple(body.prompt(index) for index, body in enumerate(bodies))
        return domain.GenerateRequest(
            prompts, self.sampling.sampling(), self.n, self.logprobs, self.stream, self.fingerprint
        )


class CompletionAnswer(BaseModel):
    """One finished completion."""

    prompt_index: int
    sample_index: int
    text: str
    finish_reason: domain.FinishReason
    token_ids: list[int]
    logprobs: list[float] | None
    prompt_token_ids: list[int]


class GenerateAnswer(BaseModel):
    """What a call of Generate gives, in the order of prompts and samples."""

    fingerprint: str
    completions: list[CompletionAnswer]


def delta(piece: domain.CompletionDelta) -> dict[str, Any]:
    """One streamed piece."""
    members: dict[str, Any] = {
        "prompt_index": piece.prompt_index,
        "sample_index": piece.sample_index,
        "text": piece.text,
        "token_ids": piece.token_ids.tolist(),
    }
    if piece.logprobs is not None:
        members["logprobs"] = piece.logprobs.tolist()
    if piece.finish_reason is not None:
        members["finish_reason"] = piece.finish_reason.value
    if piece.prompt_token_ids is not None:
        members["prompt_token_ids"] = piece.prompt_token_ids.tolist()
    return members


class LimitsAnswer(BaseModel):
    """The largest numbers that one request may carry."""

    sequence_tokens: int
    top_k: int
    candidates: int
    request_tokens: int
    sequences: int
    temperatures: int


class TeacherAnswer(BaseModel):
    """What the teacher is; see GetTeacherResponse in teacher.proto."""

    name: str
    fingerprint: str
    tokenizer_hash: str
    template_hash: str
    vocab_size: int
    normalized_size: int
    eos_token_ids: list[int]
    limits: LimitsAnswer
    modes: list[domain.Mode]
    fields: list[domain.Field]
    can_generate: bool
    engine: str
    dtype: str
    quantization: str
    hidden_size: int
    hidden_dtype: str


def teacher(info: domain.TeacherInfo) -> TeacherAnswer:
    """The description's model."""
    names = [field.name for field in fields(domain.TeacherInfo)]
    members = {name: getattr(info, name) for name in names}
    members["limits"] = LimitsAnswer(**vars(info.limits))
    members["fields"] = sorted(info.fields, key=lambda field: field.value)
    return TeacherAnswer(**members)


def _shorthand(value: str | list[int]) -> dict[str, Any]:
    return {"text": value} if isinstance(value, str) else {"token_ids": value}
