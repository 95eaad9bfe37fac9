"""One OpenAI-shaped call: completions from the service, and scores of its prompts where these are wanted.

It knows no route and no engine; `openai_choices` puts what comes into OpenAI's and vLLM's shapes.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

import numpy as np

from protos import scores as domain
from protos.errors import InvalidSequence, TooLarge
from teacher_server import checks
from teacher_server.auth import Caller
from teacher_server.service import TeacherService
from teacher_server.transports.openai_body import OpenAiBody
from teacher_server.transports.openai_schemas import ChatBody, CompletionBody
from teacher_server.transports.openai_tokens import check_model


@dataclass(frozen=True)
class Wish:
    """What the two kinds of call differ in. `alternatives` is None where no log-probabilities are wanted."""

    prompts: list[domain.Prompt]
    max_tokens: int | None
    alternatives: int | None
    echo: bool
    chat: bool
    special: bool = False
    include_reasoning: bool = True

    @property
    def characters(self) -> int:
        """Characters of the prompts' text; ids count as one each."""
        messages = sum(len(message.content) for one in self.prompts for message in one.messages)
        return messages + sum(
            len(one.text) + (0 if one.token_ids is None else len(one.token_ids)) for one in self.prompts
        )


def completion_wish(body: CompletionBody) -> Wish:
    """The wish of /v1/completions."""
    return Wish(body.prompts(), body.max_tokens, body.logprobs, body.echo, False, body.add_special_tokens)


def chat_wish(body: ChatBody) -> Wish:
    """The wish of /v1/chat/completions."""
    limit = body.max_completion_tokens or body.max_tokens
    alternatives = body.top_logprobs if body.logprobs else None
    return Wish([body.prompt()], limit, alternatives, False, True, include_reasoning=body.include_reasoning)


class OpenAiCall:
    """A call whose prompts are tokens by now; `deltas` runs it."""

    def __init__(
        self, service: TeacherService, caller: Caller, body: OpenAiBody, wish: Wish, most_numbers: int
    ) -> None:
        info = service.teacher()
        check_model(service, body.model)
        checks.check_completions(len(wish.prompts), body.n, info)
        self._service, self._caller = service, caller
        self.body, self.wish, self.info, self.text = body, wish, info, service.text
        self.prompts = [service.tokenize(i, prompt, special=wish.special) for i, prompt in enumerate(wish.prompts)]
        for index, ids in enumerate(self.prompts):
            if not len(ids):
                raise InvalidSequence(f"prompt {index} has no tokens", index=index)
            checks.check_ids(ids, info.vocab_size, f"prompt {index}", index)
        left = info.limits.sequence_tokens - max(len(ids) for ids in self.prompts)
        self.max_tokens = max(left, 1) if wish.max_tokens is None else wish.max_tokens
        self.request = self._request() if self.max_tokens else None
        self.numbers = self._numbers()
        if self.numbers > most_numbers:
            raise TooLarge(
                f"the answer may have {self.numbers} log-probabilities, this server writes {most_numbers} as JSON; ask "
                "for fewer alternatives or tokens, or use /v1/score with protobuf"
            )
        self.prompt_scores: dict[int, domain.Scores] = {}
        """Of the prompts' tokens but their first; known once `deltas` has begun."""

    def _request(self) -> domain.GenerateRequest:
        stops = self.body.stops
        prompts = tuple(
            domain.Prompt(token_ids=ids, mode=prompt.mode)
            for ids, prompt in zip(self.prompts, self.wish.prompts, strict=True)
        )
        return domain.GenerateRequest(
            prompts,
            self.body.sampling(self.max_tokens),
            self.body.n,
            self.wish.alternatives is not None,
            self.body.stream,
            alternatives=self.wish.alternatives or 0,
            rules=domain.TextRules(stops, self.body.include_stop_str_in_output, self.wish.chat),
        )

    @property
    def echoed_logprobs(self) -> bool:
        """Whether the echoed prompt has log-probabilities."""
        return self.wish.echo and self.wish.alternatives is not None

    @property
    def prompt_top_k(self) -> int | None:
        """Alternatives to the prompts' tokens that are wanted at most; None where they are not scored."""
        wanted = [self.body.prompt_logprobs] + ([self.wish.alternatives] if self.wish.echo else [])
        given = [one for one in wanted if one is not None]
        return max(given) if given else None

    def _numbers(self) -> int:
        """The log-probabilities that an answer may have: those of `n` echoes and completions of each prompt."""
        each = 0 if self.wish.alternatives is None else 1 + self.wish.alternatives
        prompt = 0 if self.prompt_top_k is None else 1 + self.prompt_top_k
        whole = 0 if self.body.stream else self.body.n * self.max_tokens * each
        return sum(len(ids) * prompt * self.body.n + whole for ids in self.prompts)

    async def deltas(self) -> AsyncGenerator[list[domain.CompletionDelta], None]:
        """Scores the prompts where that is wanted, then gives the completions' pieces."""
        await self._score_prompts()
        if self.request is None:
            none, end = np.empty(0, np.int32), domain.FinishReason.LENGTH
            yield [
                domain.CompletionDelta(index, sample, none, finish_reason=end, prompt_token_ids=ids)
                for index, ids in enumerate(self.prompts)
                for sample in range(self.body.n)
            ]
            return
        async with aclosing(self._service.generate(self.request, self._caller)) as pieces:
            async for some in pieces:
                yield some

    async def _score_prompts(self) -> None:
        top_k = self.prompt_top_k
        positions = [index for index, ids in enumerate(self.prompts) if len(ids) > 1]
        if top_k is None or not positions:
            return
        want = {domain.Field.TOKEN_LOGPROBS} | ({domain.Field.TOP} if top_k else set())
        sequences = tuple(domain.Sequence(self.prompts[index]) for index in positions)
        call = domain.ScoreRequest(sequences, domain.ScoreSpec(top_k, want=frozenset(want)))
        async with aclosing(self._service.score(call, self._caller)) as results:
            async for index, scores in results:
                self.prompt_scores[positions[index]] = scores
