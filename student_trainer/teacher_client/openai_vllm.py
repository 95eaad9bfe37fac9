"""vLLM's /v1/completions with prompt_logprobs and token ids, which strong2weak's own OpenAI face speaks too.

Prompt log-probabilities arrive as JSON, one object for each alternative: some 5 KB a token at 64 of them, which is what
such a server costs. Legend: N tokens, T scored positions, K alternatives.
"""

from __future__ import annotations

from typing import Any

from protos import errors
from protos.scores import ScoreRequest, ids_array
from student_trainer.teacher_client.openai_completions import Ask, Finished, floats
from student_trainer.teacher_client.openai_dialects import Call, Row
from student_trainer.teacher_client.openai_scores import table


class Vllm:
    """See `Dialect`. `names_ids` says that ids come as names `token_id:N` of log-probabilities, as servers without
    `return_token_ids` give them.
    """

    def __init__(self, names_ids: bool = False) -> None:
        self.names_ids = names_ids

    def score_call(self, request: ScoreRequest, served: str) -> Call:
        """See `Dialect`. One token is generated, because vLLM generates at least one."""
        body = {
            "model": served,
            "prompt": [sequence.token_ids.tolist() for sequence in request.sequences],
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": request.spec.top_k,
        }
        return "/v1/completions", body

    def read_scores(self, answer: Any, request: ScoreRequest) -> list[Row]:
        """See `Dialect`."""
        choices = _choices(answer, len(request.sequences))
        found = []
        for sequence, choice in zip(request.sequences, choices, strict=True):
            given = choice.get("prompt_logprobs")
            if not isinstance(given, list) or len(given) != len(sequence.token_ids):
                count = len(given) if isinstance(given, list) else "no"
                raise errors.TeacherFailed(
                    f"the server gave {count} prompt_logprobs for {len(sequence.token_ids)} tokens; is it vLLM?"
                )
            start = sequence.score_start
            found.append(table(given[start:], sequence.token_ids[start:], request.spec.top_k))
        return found

    def generate_call(self, ask: Ask, served: str) -> Call:
        """See `Dialect`."""
        sampling, logprobs = ask.request.sampling, ask.request.logprobs
        body: dict[str, Any] = {
            "model": served,
            "prompt": ask.prompts,
            "n": ask.copies,
            "max_tokens": sampling.max_tokens,
            **ask.sampling,
        }
        if sampling.seed is not None:
            body["seed"] = sampling.seed % 2**63
        if self.names_ids:
            body |= {"logprobs": 0, "return_tokens_as_token_ids": True}
        else:
            body |= {"return_token_ids": True} | ({"logprobs": 0} if logprobs else {})
        return "/v1/completions", body

    def read_completions(self, answer: Any, ask: Ask) -> list[Finished]:
        """See `Dialect`."""
        return [self._finished(c, ask) for c in _choices(answer, ask.copies * len(ask.prompts))]

    def _finished(self, choice: dict[str, Any], ask: Ask) -> Finished:
        given: dict[str, Any] = choice.get("logprobs") or {}
        ids = _named(given.get("tokens")) if self.names_ids else choice.get("token_ids")
        if ids is None:
            raise errors.Unsupported(
                "the server gives no token ids with its completions; use vLLM 0.10.2 or later (return_token_ids)"
            )
        logprobs = floats(given.get("token_logprobs") or []) if ask.request.logprobs else None
        by = choice.get("stop_reason")
        text, reason = str(choice.get("text", "")), str(choice.get("finish_reason"))
        return Finished(ids_array(ids), text, reason, by if isinstance(by, int) else None, logprobs)


def _choices(answer: Any, count: int) -> list[dict[str, Any]]:
    """The choices of an OpenAI-shaped answer by their index."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or len(choices) != count:
        found = len(choices) if isinstance(choices, list) else "no"
        raise errors.TeacherFailed(f"the server answered with {found} choices, {count} were asked for")
    return sorted(choices, key=lambda choice: int(choice["index"]))


def _named(names: Any) -> list[int] | None:
    """Ids out of names `token_id:N`; None where they are no such names."""
    if not isinstance(names, list) or not all(str(name).startswith("token_id:") for name in names):
        return None
    return [int(str(name).removeprefix("token_id:")) for name in names]
