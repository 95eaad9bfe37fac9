"""One OpenAI-shaped call: completions from the service, and scores of the finished sequences where alternatives or the
prompt's log-probabilities are wanted, put into OpenAI's and vLLM's shapes.

It knows no route and no engine. Legend: P tokens of a prompt, N tokens of prompt and completion.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import numpy as np

from protos import scores as domain
from protos.errors import InvalidSequence, TeacherMismatch
from teacher_server import checks
from teacher_server.auth import Caller
from teacher_server.service import TeacherService
from teacher_server.transports import openai_logprobs as shapes
from teacher_server.transports.completions import collect
from teacher_server.transports.openai_schemas import ChatBody, CompletionBody, OpenAiBody


@dataclass(frozen=True)
class Wish:
    """What the two kinds of call differ in. `alternatives` is None where no log-probabilities are wanted."""

    prompts: list[domain.Prompt]
    max_tokens: int | None
    alternatives: int | None
    echo: bool
    chat: bool


def completion_wish(body: CompletionBody) -> Wish:
    """The wish of /v1/completions."""
    return Wish(body.prompts(), body.max_tokens, body.logprobs, body.echo, False)


def chat_wish(body: ChatBody) -> Wish:
    """The wish of /v1/chat/completions."""
    limit = body.max_completion_tokens or body.max_tokens
    return Wish([body.prompt()], limit, body.top_logprobs if body.logprobs else None, False, True)


class OpenAiCall:
    """A call whose prompts are tokens by now; `whole` answers at once, `request` and `chunks` serve a stream."""

    def __init__(self, service: TeacherService, caller: Caller, body: OpenAiBody, wish: Wish) -> None:
        info = service.teacher()
        if body.model and body.model != info.name:
            raise TeacherMismatch(f"the call names the model {body.model!r}, this server serves {info.name!r}")
        if body.stream:
            body.refuse_in_a_stream(wish.alternatives or 0, wish.echo)
        checks.check_completions(len(wish.prompts), body.n, info)
        self._service, self._caller, self._body, self._wish = service, caller, body, wish
        self._text = service.text
        self._namer = shapes.Namer(self._text.decode, body.return_tokens_as_token_ids)
        self.prompts = [service.tokenize(index, prompt) for index, prompt in enumerate(wish.prompts)]
        for index, ids in enumerate(self.prompts):
            if not len(ids):
                raise InvalidSequence(f"prompt {index} has no tokens", index=index)
        left = info.limits.sequence_tokens - max(len(ids) for ids in self.prompts)
        self._max_tokens = max(left, 1) if wish.max_tokens is None else wish.max_tokens
        name = "chat.completion" if wish.chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if wish.chat else 'cmpl'}-{caller.request_id}",
            "object": f"{name}.chunk" if wish.chat and body.stream else name,
            "created": int(time.time()),
            "model": info.name,
        }
        self._sampled = 0
        self._begun: set[int] = set()

    def request(self) -> domain.GenerateRequest:
        """The domain's call."""
        prompts = tuple(
            domain.Prompt(token_ids=ids, mode=prompt.mode)
            for ids, prompt in zip(self.prompts, self._wish.prompts, strict=True)
        )
        sampling = self._body.sampling(self._max_tokens)
        return domain.GenerateRequest(
            prompts, sampling, self._body.n, self._wish.alternatives is not None, self._body.stream
        )

    async def whole(self) -> dict[str, Any]:
        """The answer that is not a stream."""
        if self._max_tokens:
            rows = await collect(self._service, self.request(), self._caller)
        else:
            none = np.empty(0, np.int32)
            rows = [
                [domain.Completion(ids, none, "", domain.FinishReason.LENGTH)] * self._body.n for ids in self.prompts
            ]
        completions = [completion for row in rows for completion in row]
        self._sampled = sum(len(completion.token_ids) for completion in completions)
        scores = await self._scores(completions)
        choices = [self._choice(index, one, scores.get(index)) for index, one in enumerate(completions)]
        answer = self._head | {"choices": choices, "usage": self._usage()}
        if self._wish.chat and self._body.prompt_logprobs is not None:
            answer["prompt_logprobs"] = self._prompt_logprobs(completions[0], scores.get(0))
        return answer

    @property
    def _score_start_is_one(self) -> bool:
        return self._wish.echo or self._body.prompt_logprobs is not None

    def _start(self, completion: domain.Completion) -> int:
        return 1 if self._score_start_is_one else len(completion.prompt_token_ids)

    async def _scores(self, completions: list[domain.Completion]) -> dict[int, domain.Scores]:
        """Scores by index of completion, where the answer needs more than the sampled log-probabilities."""
        alternatives = self._wish.alternatives
        if not (alternatives or self._body.prompt_logprobs is not None or (self._wish.echo and alternatives == 0)):
            return {}
        top_k = max(alternatives or 0, self._body.prompt_logprobs or 0)
        want = {domain.Field.TOKEN_LOGPROBS} | ({domain.Field.TOP} if top_k else set())
        positions, sequences = [], []
        for index, one in enumerate(completions):
            ids = np.concatenate([one.prompt_token_ids, one.token_ids])
            if self._start(one) < len(ids):
                positions.append(index)
                sequences.append(domain.Sequence(ids, self._start(one)))
        if not sequences:
            return {}
        call = domain.ScoreRequest(tuple(sequences), domain.ScoreSpec(top_k, want=frozenset(want)))
        async with aclosing(self._service.score(call, self._caller)) as results:
            return {positions[index]: scores async for index, scores in results}

    def _choice(self, index: int, one: domain.Completion, scores: domain.Scores | None) -> dict[str, Any]:
        alternatives, chat, echo = self._wish.alternatives, self._wish.chat, self._wish.echo
        logprobs: dict[str, Any] | None = None
        if alternatives is not None:
            if alternatives or echo:
                ids = np.concatenate([one.prompt_token_ids, one.token_ids])
                first = 0 if echo else len(one.prompt_token_ids)
                rows = shapes.rows(ids, first, scores, self._start(one), alternatives, self._namer)
            else:
                rows = shapes.sampled_rows(one.token_ids, one.logprobs, self._namer)
            logprobs = shapes.chat_shape(rows) if chat else shapes.completion_shape(rows, alternatives)
        choice: dict[str, Any] = {"index": index, "logprobs": logprobs, "finish_reason": one.finish_reason.value}
        if chat:
            return choice | {"message": {"role": "assistant", "content": one.text}}
        if self._body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = self._prompt_logprobs(one, scores)
        return choice | {"text": self._echoed(index) + one.text}

    def _echoed(self, index: int) -> str:
        """The prompt's text where it is echoed: as it was given, else decoded."""
        if not self._wish.echo:
            return ""
        prompt = index // self._body.n
        return self._wish.prompts[prompt].text or self._text.decode(self.prompts[prompt])

    def _prompt_logprobs(self, one: domain.Completion, scores: domain.Scores | None) -> list[dict[str, Any] | None]:
        top_k = self._body.prompt_logprobs or 0
        return shapes.prompt_shape(shapes.rows(one.prompt_token_ids, 0, scores, 1, top_k, self._namer))

    def chunks(self, deltas: list[domain.CompletionDelta]) -> Iterable[dict[str, Any]]:
        """A stream's chunks of some pieces."""
        for delta in deltas:
            self._sampled += len(delta.token_ids)
            index = delta.prompt_index * self._body.n + delta.sample_index
            logprobs: dict[str, Any] | None = None
            if self._wish.alternatives is not None:
                rows = shapes.sampled_rows(delta.token_ids, delta.logprobs, self._namer)
                logprobs = shapes.chat_shape(rows) if self._wish.chat else shapes.completion_shape(rows, 0)
            reason = delta.finish_reason.value if delta.finish_reason else None
            choice = {"index": index, "logprobs": logprobs, "finish_reason": reason}
            if self._wish.chat:
                role = {} if index in self._begun else {"role": "assistant"}
                choice["delta"] = role | {"content": delta.text}
                self._begun.add(index)
            else:
                choice["text"] = delta.text
            yield self._head | {"choices": [choice]}

    def last_chunks(self) -> Iterable[dict[str, Any]]:
        """What a stream says after its last piece."""
        if self._body.include_usage:
            yield self._head | {"choices": [], "usage": self._usage()}

    def _usage(self) -> dict[str, int]:
        prompt = sum(len(ids) for ids in self.prompts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._sampled,
            "total_tokens": prompt + self._sampled,
        }
