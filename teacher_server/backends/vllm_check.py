"""What a vLLM engine can honour, found out at start-up on a few tokens, and the two ways to a score.

`Extended` asks our code inside the workers for every field; `Public` makes do with what vLLM gives everybody. The first
must agree with the second, and with the plain way from the model's own logits, before anyone is served.
Legend: N tokens, T scored positions, K alternatives.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from protos.errors import TeacherError, Unsupported
from protos.scores import Field, Scores, ScoreSpec, Sequence
from teacher_server.backends.vllm_engine import Engine
from teacher_server.backends.vllm_tap import Kept, alternatives
from teacher_server.backends.vllm_wire import Question

_LOG = logging.getLogger(__name__)

PROBE_TOKENS = 24
TOP = 8
TOLERANCE = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.25}
"""Nats by which two ways may differ: logits of the engine's own dtype are rounded to 24, 11 and 8 bits."""


class Reader(Protocol):
    """One way to scores."""

    @property
    def fields(self) -> frozenset[Field]:
        """What it can give."""
        ...

    @property
    def temperatures(self) -> int:
        """The most temperatures of one call."""
        ...

    async def score(self, sequence: Sequence, spec: ScoreSpec) -> Scores:
        """The fields that `spec` asks for."""
        ...


class Extended:
    """Scores from TeacherWorker: every field, rows from score_start alone, at most `temperatures` of them."""

    def __init__(self, engine: Engine, temperatures: int, *, hidden_states: bool, plain: bool = False) -> None:
        self._engine = engine
        self._plain = plain
        self.temperatures = temperatures
        self.fields = frozenset(Field) if hidden_states else frozenset(Field) - {Field.HIDDEN_STATES}

    async def score(self, sequence: Sequence, spec: ScoreSpec) -> Scores:
        """The score of one sequence; ValueError where the engine left rows out."""
        question = Question.about(sequence, spec, plain=self._plain)
        output = await self._engine.ask(sequence.token_ids, question.extra_args())
        if not isinstance(output.prompt_logprobs, Kept):
            raise ValueError("the engine gave no tensors for a prompt")  # noqa: TRY004 - not the caller's type
        return output.prompt_logprobs.answer().scores(question)


class Public:
    """Scores from vLLM's public parameters: token and top at temperature 1, candidates where the runner knows them."""

    temperatures = 1

    def __init__(self, engine: Engine, *, candidates: bool) -> None:
        self._engine = engine
        known = {Field.TOKEN_LOGPROBS, Field.TOP}
        self.fields = frozenset(known | {Field.CANDIDATE_LOGPROBS} if candidates else known)

    async def score(self, sequence: Sequence, spec: ScoreSpec) -> Scores:
        """The score of one sequence; the context before score_start is read out too and thrown away."""
        fields = spec.fields(sequence.candidates)
        if fields - self.fields:
            raise Unsupported(f"this teacher cannot give {', '.join(sorted(f.value for f in fields - self.fields))}")
        options: dict[str, Any] = {}
        if fields & {Field.TOKEN_LOGPROBS, Field.TOP}:
            options |= {"prompt_logprobs": spec.top_k, "flat_logprobs": True}
        else:
            options |= {"prompt_logprobs": None}
        if Field.CANDIDATE_LOGPROBS in fields:
            options |= {
                "prompt_logprob_token_ids": sequence.candidate_ids,
                "prompt_logprob_start": sequence.score_start - 1,
            }
        output = await self._engine.ask(sequence.token_ids, None, **options)
        arrays: dict[str, Any] = {}
        if options["prompt_logprobs"] is not None:
            ids, numbers = alternatives(output.prompt_logprobs)
            ids, numbers = ids[sequence.score_start - 1 :], numbers[sequence.score_start - 1 :]
            if Field.TOKEN_LOGPROBS in fields:
                arrays["token_logprobs"] = np.ascontiguousarray(numbers[:, 0], dtype=np.float32)
            if Field.TOP in fields:
                arrays["top_token_ids"] = np.ascontiguousarray(ids[:, 1:], dtype=np.int32)
                arrays["top_logprobs"] = np.ascontiguousarray(numbers[:, 1:], dtype=np.float32)
        if Field.CANDIDATE_LOGPROBS in fields:
            arrays["candidate_logprobs"] = np.array(output.prompt_token_id_logprobs, dtype=np.float32)
        return Scores(**arrays)


async def why_not_extended(engine: Engine, found: Mapping[str, Any], vocab_size: int, dtype: str) -> str:
    """Empty where the extension's answers are right, else what is wrong with them."""
    if not engine.keeps_tensors:
        return "this vLLM has no place to keep the tensors"
    if found.get("runner", "none") == "none":
        return "no worker took the scorer in"
    k = min(TOP, vocab_size)
    tokens = ((np.arange(PROBE_TOKENS) * 7919 + 13) % vocab_size).astype(np.int32)
    candidates = np.stack([(tokens[3:] + i) % vocab_size for i in range(min(3, vocab_size))], axis=1)
    sequence = Sequence(tokens, 3, candidates)
    spec = ScoreSpec(k, (1.0, 2.0))
    tolerance = TOLERANCE.get(dtype, 0.25)
    try:
        fast = await Extended(engine, 2, hidden_states=False).score(sequence, spec)
        plain = await Extended(engine, 2, hidden_states=False, plain=True).score(sequence, spec)
        wanted = ScoreSpec(k, want=frozenset({Field.TOKEN_LOGPROBS, Field.TOP}))
        public = await Public(engine, candidates=False).score(Sequence(tokens, 3), wanted)
    except (ValueError, TeacherError) as error:
        if not engine.alive:
            raise
        return f"a probe failed: {error.__cause__ or error}"
    for other, name in ((plain, "the model's own logits"), (public, "vLLM's public log-probabilities")):
        for field in ("token_logprobs", "top_logprobs", "candidate_logprobs", "log_normalizer", "tail_logprob"):
            theirs, ours = getattr(other, field), getattr(fast, field)
            if theirs is None or ours is None:
                continue
            if theirs.shape != ours.shape:
                return f"{field} has the shape {ours.shape}, {name} have {theirs.shape}"
            apart = float(np.abs(theirs - ours).max())
            if not apart <= tolerance:
                return f"{field} is {apart:.3g} nats away from {name}, {tolerance:g} are allowed"
    return ""


async def choose(engine: Engine, found: Mapping[str, Any], vocab_size: int, dtype: str, temperatures: int) -> Reader:
    """The extension where it works, else the public way with a warning that names what is lost."""
    reason = await why_not_extended(engine, found, vocab_size, dtype)
    if not reason:
        return Extended(engine, temperatures, hidden_states=found.get("head") == "direct")
    reader = Public(engine, candidates=bool(getattr(engine.config, "use_v2_model_runner", False)))
    how = "the engine's tensors" if engine.keeps_tensors else "vLLM's flat lists of Python numbers"
    _LOG.warning(
        "scores come from vLLM's public parameters through %s, because %s: no tails, no normalisers, no temperatures, "
        "context is read out too, and top-64 costs about %s of the prefill rate",
        how,
        reason,
        "12 %" if engine.keeps_tensors else "25 %",
    )
    return reader
