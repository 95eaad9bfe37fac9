"""Bodies of /v1/completions and /v1/chat/completions, with vLLM's additions; `openai_body` says what is refused."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from protos import scores as domain
from protos.errors import InvalidSequence
from teacher_server.transports.openai_body import OpenAiBody
from teacher_server.transports.openai_messages import ChatMessage, chat_prompt
from teacher_server.transports.schemas import FIRST, Ids


class CompletionBody(OpenAiBody):
    """A call of /v1/completions."""

    prompt: str | Annotated[list[str], FIRST] | Ids | Annotated[list[Ids], FIRST]
    """Text or token ids, one prompt or a list of them."""
    max_tokens: int = Field(default=16, ge=0)
    """Largest number of tokens of one completion; 0 needs echo or prompt_logprobs, and only scores."""
    echo: bool = False
    """Return the prompt before the completion, with its log-probabilities where logprobs are wanted."""
    logprobs: int | None = Field(default=None, ge=0)
    """Return log-probabilities with that many alternatives at each position."""
    add_special_tokens: bool = True
    """Add what the tokenizer puts around a text, such as a first BOS; Qwen3's puts nothing."""

    @model_validator(mode="after")
    def _something_to_do(self) -> CompletionBody:
        if not self.prompt:
            raise ValueError("prompt is empty")
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise ValueError("max_tokens is 0: nothing to do without echo or prompt_logprobs")
        return self

    def prompts(self) -> list[domain.Prompt]:
        """The domain's prompts; InvalidSequence with an index."""
        given = self.prompt
        many: list[Any] = [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)
        prompts = []
        for index, one in enumerate(many):
            try:
                ids = None if isinstance(one, str) else domain.ids_array(one)
                prompts.append(domain.Prompt(token_ids=ids, text=one if isinstance(one, str) else ""))
            except (ValueError, OverflowError) as error:
                raise InvalidSequence(f"prompt {index}: {error}", index=index) from error
        return prompts


class ChatBody(OpenAiBody):
    """A call of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], FIRST] = Field(min_length=1)
    """Turns of the conversation."""
    chat_template_kwargs: dict[str, Any] = Field(default={})
    """`enable_thinking`, true or false, chooses the mode."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Largest number of tokens of one completion; unset means what the teacher's limit leaves."""
    max_completion_tokens: int | None = Field(default=None, ge=1)
    """The same under its newer name."""
    logprobs: bool = False
    """Return log-probabilities."""
    top_logprobs: int = Field(default=0, ge=0)
    """Number of alternatives at each position; needs logprobs."""
    include_reasoning: bool = True
    """Return what stands between think tags as the message's `reasoning`; false leaves it and all token data out."""

    @model_validator(mode="after")
    def _consistent(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give one")
        return self

    def prompt(self) -> domain.Prompt:
        """The domain's prompt; Unsupported for template arguments other than enable_thinking."""
        return chat_prompt(self.messages, self.chat_template_kwargs)
