"""Bodies of the OpenAI-shaped routes, with vLLM's additions, and what of them this teacher takes.

A parameter that would change the result and that the teacher does not have is refused (Unsupported) unless it has its
neutral value; one that changes nothing is accepted; one that nobody knows is refused with the nearest name.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from protos import scores as domain
from protos.errors import InvalidRequest, InvalidSequence, InvalidSpec, Unsupported
from teacher_server.transports.problems import short
from teacher_server.transports.schemas import FIRST, Body, Id, Ids

WITHOUT_EFFECT = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "request_id",
    "priority",
    "prompt_cache_key",
    "safety_identifier",
    "include_reasoning",
)
"""Parameters that never change a result."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "add_special_tokens": (False,),
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "continue_final_message": (False,),
    "documents": ([],),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "include_stop_str_in_output": (),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True, False),
    "stop": ([], ""),
    "structured_outputs": ({},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "typical_p": (1,),
    "use_beam_search": (False,),
}
"""Parameters that this teacher lacks, with the values (beside null) at which they change nothing."""
ADVICE = {"stop": "; stop_token_ids ends a completion at given tokens", "tools": "; put them into the messages' text"}


class StreamOptions(Body):
    """What a stream carries beside pieces."""

    include_usage: bool = False
    """Send a last event with the usage."""


class OpenAiBody(Body):
    """What completions and chat completions share."""

    model: str = ""
    """The teacher's name; empty means whichever is served."""
    temperature: float | None = Field(default=None, ge=0)
    """0 is greedy; unset means 1."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Nucleus; unset means 1."""
    top_k: int | None = Field(default=None, ge=-1)
    """Number of most likely tokens to keep; -1 and 0 keep all."""
    n: int = Field(default=1, ge=1)
    """Number of completions of each prompt."""
    seed: int | None = Field(default=None, ge=0, lt=2**64)
    """Equal calls with equal seeds give equal completions."""
    stop_token_ids: Annotated[list[Id], FIRST] = Field(default=[])
    """Ids that end a completion beside the model's own."""
    ignore_eos: bool = False
    """Let EOS ids be sampled without ending the completion."""
    stream: bool = False
    """Answer with server-sent events."""
    stream_options: StreamOptions | None = None
    """What the stream carries beside pieces."""
    return_tokens_as_token_ids: bool = False
    """Name tokens in log-probabilities as `token_id:123` instead of by their text."""
    prompt_logprobs: int | None = Field(default=None, ge=0)
    """Return the prompt's log-probabilities with that many alternatives at each position (vLLM's)."""

    @model_validator(mode="before")
    @classmethod
    def _only_what_can_be_honoured(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        kept = {}
        for name, value in values.items():
            if name in cls.model_fields:
                kept[name] = value
            elif name in NEUTRAL:
                if value is not None and value not in NEUTRAL[name]:
                    allowed = " or ".join(map(repr, NEUTRAL[name])) or "null"
                    raise Unsupported(
                        f"this teacher does not have {name} (got {short(value)}); leave it out or give {allowed}"
                        f"{ADVICE.get(name, '')}"
                    )
            elif name not in WITHOUT_EFFECT:
                kept[name] = value  # the model's own check refuses it
        return {name: value for name, value in kept.items() if value is not None}

    def sampling(self, max_tokens: int) -> domain.Sampling:
        """The domain's sampling; InvalidSpec."""
        try:
            return domain.Sampling(
                max_tokens=max_tokens,
                temperature=1.0 if self.temperature is None else self.temperature,
                top_p=1.0 if self.top_p is None else self.top_p,
                top_k=max(self.top_k or 0, 0),
                stop_token_ids=tuple(self.stop_token_ids),
                seed=self.seed,
                ignore_eos=self.ignore_eos,
            )
        except ValueError as error:
            raise InvalidSpec(str(error)) from error

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def refuse_in_a_stream(self, alternatives: int, echo: bool) -> None:
        """Unsupported for what is known only when a completion has ended."""
        if alternatives or self.prompt_logprobs is not None or echo:
            raise Unsupported(
                "alternatives (logprobs or top_logprobs above 0), prompt_logprobs and echo come without a stream only; "
                "leave stream out"
            )


class CompletionBody(OpenAiBody):
    """A call of /v1/completions."""

    prompt: str | Annotated[list[str], FIRST] | Ids | Annotated[list[Ids], FIRST]
    """Text or token ids, one prompt or a list of them."""
    max_tokens: int = Field(default=16, ge=0)
    """Largest number of tokens of one completion; 0 needs echo, and only scores."""
    echo: bool = False
    """Return the prompt before the completion, with its log-probabilities where logprobs are wanted."""
    logprobs: int | None = Field(default=None, ge=0)
    """Return log-probabilities with that many alternatives at each position."""

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


class ContentPart(Body):
    """One part of a message's content; text alone is taken."""

    type: str
    text: str = ""


class ChatMessage(Body):
    """One turn of a conversation."""

    role: str
    """Speaker: system, user, assistant or tool."""
    content: str | Annotated[list[ContentPart], FIRST]
    """Text, or a list of text parts."""

    def message(self, index: int) -> domain.Message:
        """The domain's turn; Unsupported for parts that are no text."""
        if isinstance(self.content, str):
            return domain.Message(self.role, self.content)
        for part in self.content:
            if part.type != "text":
                raise Unsupported(f"message {index} has a part of type {short(part.type)}; this teacher reads text")
        return domain.Message(self.role, "".join(part.text for part in self.content))


class ChatBody(OpenAiBody):
    """A call of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], FIRST] = Field(min_length=1)
    """Turns of the conversation."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Largest number of tokens of one completion; unset means what the teacher's limit leaves."""
    max_completion_tokens: int | None = Field(default=None, ge=1)
    """The same under its newer name."""
    logprobs: bool = False
    """Return log-probabilities."""
    top_logprobs: int = Field(default=0, ge=0)
    """Number of alternatives at each position; needs logprobs."""
    chat_template_kwargs: dict[str, Any] = Field(default={})
    """`enable_thinking`, true or false, chooses the mode."""

    @model_validator(mode="after")
    def _consistent(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give one")
        return self

    def prompt(self) -> domain.Prompt:
        """The domain's prompt; Unsupported for template arguments other than enable_thinking."""
        others = set(self.chat_template_kwargs) - {"enable_thinking"}
        if others:
            raise Unsupported(f"chat_template_kwargs takes enable_thinking alone, got {', '.join(sorted(others)[:5])}")
        thinking = self.chat_template_kwargs.get("enable_thinking")
        if thinking not in (None, True, False):
            raise InvalidRequest(f"enable_thinking must be true or false, got {short(thinking)}")
        mode = None if thinking is None else domain.Mode.THINKING if thinking else domain.Mode.NON_THINKING
        turns = tuple(message.message(index) for index, message in enumerate(self.messages))
        return domain.Prompt(turns, mode=mode)
