"""SGLang's native /generate, as its documentation and source (0.5) have it.

Not its /v1/completions, which takes few alternatives and gives no token ids. Legend: N tokens, T scored positions, K
alternatives.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from protos import errors
from protos.scores import Sampling, ScoreRequest, ids_array
from student_trainer.teacher_client.openai_completions import Ask, Finished, floats
from student_trainer.teacher_client.openai_dialects import Call, Row


class Sglang:
    """See `Dialect`."""

    def score_call(self, request: ScoreRequest, served: str) -> Call:
        """See `Dialect`; `logprob_start_len` is one position earlier, whose own entry is null."""
        body = {
            "input_ids": [sequence.token_ids.tolist() for sequence in request.sequences],
            "sampling_params": {"max_new_tokens": 0, "temperature": 0},
            "return_logprob": True,
            "logprob_start_len": [sequence.score_start - 1 for sequence in request.sequences],
            "top_logprobs_num": [request.spec.top_k] * len(request.sequences),
            "return_text_in_logprobs": False,
        }
        return "/generate", body

    def read_scores(self, answer: Any, request: ScoreRequest) -> list[Row]:
        """See `Dialect`."""
        found = []
        for sequence, one in zip(request.sequences, _answers(answer, len(request.sequences)), strict=True):
            meta = one.get("meta_info") or {}
            tokens = _rows(meta.get("input_token_logprobs"), sequence.positions)
            ids = sequence.token_ids[sequence.score_start :]
            if [entry[1] for entry in tokens] != ids.tolist():
                raise errors.TeacherFailed("the server scored other tokens than it was asked for")
            own = np.fromiter((entry[0] for entry in tokens), np.float32, len(tokens))
            shape = len(tokens), request.spec.top_k
            if not request.spec.top_k:
                found.append((own, np.zeros(shape, np.int32), np.zeros(shape, np.float32)))
                continue
            rows = _rows(meta.get("input_top_logprobs"), sequence.positions)
            flat = [entry for row in rows for entry in row]
            if len(flat) != shape[0] * shape[1]:
                raise errors.TeacherFailed(
                    f"the server gave {len(flat)} alternatives at {shape[0]} positions, {shape[1]} at each were wanted"
                )
            logprobs = np.fromiter((entry[0] for entry in flat), np.float32, len(flat)).reshape(shape)
            top = np.fromiter((entry[1] for entry in flat), np.int32, len(flat)).reshape(shape)
            order = np.argsort(-logprobs, axis=1, kind="stable")
            found.append((own, np.take_along_axis(top, order, 1), np.take_along_axis(logprobs, order, 1)))
        return found

    def generate_call(self, ask: Ask, served: str) -> Call:
        """See `Dialect`. Each sample is a prompt of its own, with a seed of its own."""
        samples = range(ask.copies)
        body = {
            "input_ids": [prompt for prompt in ask.prompts for _ in samples],
            "sampling_params": [self._sampling(ask, sample) for _ in ask.prompts for sample in samples],
            "return_logprob": ask.request.logprobs,
        }
        return "/generate", body

    def _sampling(self, ask: Ask, sample: int) -> dict[str, Any]:
        sampling: Sampling = ask.request.sampling
        chosen: dict[str, Any] = {
            "max_new_tokens": sampling.max_tokens,
            **ask.sampling,
        }
        if sampling.seed is not None:
            chosen["sampling_seed"] = (sampling.seed + sample) % 2**31
        return chosen

    def read_completions(self, answer: Any, ask: Ask) -> list[Finished]:
        """See `Dialect`."""
        return [self._finished(a, ask) for a in _answers(answer, ask.copies * len(ask.prompts))]

    def _finished(self, one: dict[str, Any], ask: Ask) -> Finished:
        if one.get("output_ids") is None:
            raise errors.Unsupported("the server gives no output_ids with its completions; use SGLang 0.5 or later")
        meta = one.get("meta_info") or {}
        reason = meta.get("finish_reason") or {}
        by = reason.get("matched")
        given = [entry[0] for entry in meta.get("output_token_logprobs") or []]
        logprobs = floats(given) if ask.request.logprobs else None
        ids, text = ids_array(one["output_ids"]), str(one.get("text", ""))
        return Finished(ids, text, str(reason.get("type")), by if isinstance(by, int) else None, logprobs)


def _answers(answer: Any, count: int) -> list[dict[str, Any]]:
    """SGLang's answers in order."""
    if not isinstance(answer, list) or len(answer) != count:
        found = len(answer) if isinstance(answer, list) else "no"
        raise errors.TeacherFailed(f"the server gave {found} answers, {count} were asked for")
    return answer


def _rows(given: Any, positions: int) -> list[Any]:
    """SGLang's rows of scored positions, without the null one before them."""
    if not isinstance(given, list) or len(given) != positions + 1:
        count = len(given) if isinstance(given, list) else "no"
        raise errors.TeacherFailed(f"the server gave {count} rows of log-probabilities for {positions} positions")
    return given[1:]
