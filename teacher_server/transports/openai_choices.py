"""What a call gave, in OpenAI's shapes with vLLM's additions: whole answers and a stream's chunks.

It knows a call and its pieces, no route. Members that vLLM has and this teacher has nothing for are null or not there;
docs/clients.md lists them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from protos import scores as domain
from teacher_server.transports import openai_logprobs as shapes
from teacher_server.transports.openai_calls import OpenAiCall
from teacher_server.transports.openai_logprobs import Row


class Choices:
    """The answer of one call; `whole` for all completions, `chunks` and `last_chunks` for a stream."""

    def __init__(self, call: OpenAiCall, request_id: str) -> None:
        self._call, self._body, self._wish = call, call.body, call.wish
        self._namer = shapes.Namer(call.text, call.body.return_tokens_as_token_ids)
        self._prompt_rows: dict[int, list[Row]] = {}
        name = "chat.completion" if self._wish.chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if self._wish.chat else 'cmpl'}-{request_id}",
            "object": f"{name}.chunk" if self._wish.chat and self._body.stream else name,
            "created": int(time.time()),
            "model": call.info.name,
            "system_fingerprint": call.info.fingerprint,
        }
        self._sampled: dict[int, int] = {}
        self._thoughts: dict[int, int] = {}
        self._offsets: dict[int, int] = {}

    @property
    def _hidden(self) -> bool:
        """Whether token data would show reasoning that is not wanted."""
        return self._wish.chat and not self._wish.include_reasoning

    def whole(self, completions: list[list[domain.Completion]]) -> dict[str, Any]:
        """The answer that is not a stream."""
        choices: list[dict[str, Any]] = []
        for prompt, row in enumerate(completions):
            for one in row:
                index = len(choices)
                self._sampled[index], self._thoughts[index] = len(one.token_ids), one.reasoning_tokens
                choices.append(self._choice(index, prompt, one))
        answer = self._head | {"choices": choices, "service_tier": None, "usage": self._usage()}
        if self._wish.chat:
            answer |= {"prompt_logprobs": self._prompt_logprobs(0)} | self._given(0)
        return answer

    def _choice(self, index: int, prompt: int, one: domain.Completion) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": index,
            "logprobs": self._logprobs(index, prompt, one, first=True),
            "finish_reason": one.finish_reason.value,
            "stop_reason": self._stop_reason(one),
            "token_ids": self._token_ids(one),
        }
        if self._wish.chat:
            reasoning = one.reasoning if self._wish.include_reasoning else ""
            content = None if one.reasoning and not one.text else one.text
            nothing = dict.fromkeys(("refusal", "annotations", "audio", "function_call"))
            message = {"role": "assistant", "content": content, "reasoning": reasoning or None} | nothing
            return choice | {"message": message}
        choice |= {"prompt_logprobs": self._prompt_logprobs(prompt)} | self._given(prompt)
        return choice | {"text": self._echoed(prompt) + one.text}

    def _logprobs(
        self, index: int, prompt: int, one: domain.Completion | domain.CompletionDelta, *, first: bool
    ) -> dict[str, Any] | None:
        top_k = self._wish.alternatives
        if top_k is None or self._hidden:
            return None
        rows = shapes.rows(one.token_ids, one.logprobs, one.top_token_ids, one.top_logprobs, self._namer)
        if self._wish.chat:
            return shapes.chat_shape(rows, top_k)
        if first and self._wish.echo:
            rows = self._rows_of(prompt) + rows
        offset = self._offsets.get(index, 0)
        self._offsets[index] = offset + sum(len(row.token.name) for row in rows)
        return shapes.completion_shape(rows, top_k, offset)

    def _rows_of(self, prompt: int) -> list[Row]:
        if prompt not in self._prompt_rows:
            scores = self._call.prompt_scores.get(prompt)
            self._prompt_rows[prompt] = shapes.prompt_rows(self._call.prompts[prompt], scores, self._namer)
        return self._prompt_rows[prompt]

    def name_prompts(self) -> None:
        """Makes the rows of prompts that are echoed with log-probabilities, which takes a while for long ones."""
        if self._call.echoed_logprobs:
            for prompt in range(len(self._call.prompts)):
                self._rows_of(prompt)

    def _prompt_logprobs(self, prompt: int) -> list[dict[str, Any] | None] | None:
        top_k = self._body.prompt_logprobs
        return None if top_k is None else shapes.prompt_shape(self._rows_of(prompt), top_k)

    def _echoed(self, prompt: int) -> str:
        """The prompt's text where it is echoed: as it was given, else decoded."""
        if not self._wish.echo:
            return ""
        return self._wish.prompts[prompt].text or self._call.text.decode(self._call.prompts[prompt], special=True)

    def _token_ids(self, one: domain.Completion | domain.CompletionDelta) -> list[int] | None:
        return one.token_ids.tolist() if self._body.return_token_ids and not self._hidden else None

    def _stop_reason(self, one: domain.Completion | domain.CompletionDelta) -> str | int | None:
        """The stop string or id that the call named and that ended it; None for the model's own end or a length."""
        if one.stop or one.finish_reason is not domain.FinishReason.STOP:
            return one.stop or None
        last = int(one.token_ids[-1])
        own = () if self._body.ignore_eos else self._call.info.eos_token_ids
        return last if last in self._body.stop_token_ids and last not in own else None

    def chunks(self, deltas: list[domain.CompletionDelta]) -> Iterator[dict[str, Any]]:
        """A stream's chunks of some pieces; a piece whose text is held back and that says nothing else gives none."""
        for delta in deltas:
            index, prompt = delta.prompt_index * self._body.n + delta.sample_index, delta.prompt_index
            first = index not in self._sampled
            self._sampled[index] = self._sampled.get(index, 0) + len(delta.token_ids)
            self._thoughts[index] = self._thoughts.get(index, 0) + delta.reasoning_tokens
            if first and self._wish.chat:
                yield self._chunk(prompt, index, {"delta": {"role": "assistant", "content": ""}}, 0) | self._given(
                    prompt
                )
            choice: dict[str, Any] = {"token_ids": self._token_ids(delta)}
            logprobs = self._logprobs(index, prompt, delta, first=first)
            reason = delta.finish_reason.value if delta.finish_reason else None
            if self._wish.chat:
                said = {"content": delta.text, "reasoning": delta.reasoning if self._wish.include_reasoning else ""}
                choice["delta"] = {name: text for name, text in said.items() if text}
                something = bool(choice["delta"])
            else:
                choice["text"] = (self._echoed(prompt) if first else "") + delta.text
                choice |= self._given(prompt) if first else {"prompt_token_ids": None}
                something = first or bool(choice["text"])
            if something or reason or logprobs is not None or choice["token_ids"]:
                choice |= {"logprobs": logprobs, "finish_reason": reason, "stop_reason": self._stop_reason(delta)}
                yield self._chunk(prompt, index, choice, self._sampled[index])

    def _given(self, prompt: int) -> dict[str, Any]:
        """The prompt's ids, null where the call does not want them."""
        ids = self._call.prompts[prompt].tolist() if self._body.return_token_ids else None
        return {"prompt_token_ids": ids}

    def _chunk(self, prompt: int, index: int, choice: dict[str, Any], sampled: int) -> dict[str, Any]:
        whole = {"index": index, "logprobs": None, "finish_reason": None} | choice
        chunk = self._head | {"choices": [whole]}
        if self._body.stream_options.continuous_usage_stats:
            thoughts = self._thoughts.get(index, 0) if sampled else 0
            chunk["usage"] = self._usage_of(len(self._call.prompts[prompt]), sampled, thoughts)
        return chunk

    def last_chunks(self) -> Iterator[dict[str, Any]]:
        """What a stream says after its last piece."""
        if self._body.stream_options.include_usage:
            yield self._head | {"choices": [], "usage": self._usage()}

    def _usage(self) -> dict[str, Any]:
        prompts = sum(len(ids) for ids in self._call.prompts)
        return self._usage_of(prompts, sum(self._sampled.values()), sum(self._thoughts.values()))

    def _usage_of(self, prompt: int, sampled: int, thoughts: int) -> dict[str, Any]:
        usage: dict[str, Any] = {
            "prompt_tokens": prompt,
            "completion_tokens": sampled,
            "total_tokens": prompt + sampled,
        }
        if self._wish.chat and len(self._call.text.think_ids) == 2:
            usage["completion_tokens_details"] = {"reasoning_tokens": thoughts}
        return usage
