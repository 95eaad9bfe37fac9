"""What the bodies of OpenAI-shaped routes share: which parameters are taken, refused, or change nothing.

A parameter that would change the result and that the teacher does not have is refused (Unsupported) unless it has its
neutral value; one that changes nothing is accepted; one that nobody knows is refused with the nearest name.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from protos import scores as domain
from protos.errors import InvalidRequest, InvalidSpec, TooLarge, Unsupported
from teacher_server.transports.problems import short
from teacher_server.transports.schemas import FIRST, Body, Id

WITHOUT_EFFECT = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "request_id",
    "priority",
    "prompt_cache_key",
    "safety_identifier",
    "session_id",
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
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "logprob_token_ids": ([],),
    "media_io_kwargs": ({},),
    "min_p": (0,),
    "min_tokens": (0,),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True, False),
    "structured_outputs": ({},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "typical_p": (1,),
    "use_beam_search": (False,),
}
"""Parameters that this teacher lacks, with the values (beside null) at which they change nothing."""
ADVICE = {
    "tools": "; put them into the messages' text",
    "logprob_token_ids": "; /v1/score takes candidate_ids",
    "reasoning_effort": "; enable_thinking (in chat_template_kwargs) and thinking_token_budget are there for that",
}
STOPS, STOP_CHARACTERS = 16, 256
"""Stop strings of a call, and characters of one."""


class HonestBody(Body):
    """A body that refuses what it cannot honour."""

    model: str = ""
    """The teacher's name; empty means whichever is served."""

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


class StreamOptions(Body):
    """What a stream carries beside pieces."""

    include_usage: bool = False
    """Send a last event with the usage."""
    continuous_usage_stats: bool = False
    """Send each choice's usage so far with every event; needs include_usage."""


class OpenAiBody(HonestBody):
    """What completions and chat completions share."""

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
    stop: str | Annotated[list[str], FIRST] = Field(default=[])
    """Strings that end a completion where they come up in its text; they are left out of it."""
    include_stop_str_in_output: bool = False
    """Keep the stop string, or the text of a stop id, in the text."""
    stop_token_ids: Annotated[list[Id], FIRST] = Field(default=[])
    """Ids that end a completion beside the model's own."""
    ignore_eos: bool = False
    """Let EOS ids be sampled without ending the completion."""
    thinking_token_budget: int | None = Field(default=None, ge=1)
    """Largest number of tokens of a think block, which is closed after them."""
    stream: bool = False
    """Answer with server-sent events."""
    stream_options: StreamOptions = Field(default=StreamOptions())
    """What the stream carries beside pieces."""
    return_token_ids: bool = False
    """Return the ids of the prompt and of the completion's tokens beside the text (vLLM's)."""
    return_tokens_as_token_ids: bool = False
    """Name tokens in log-probabilities as `token_id:123` instead of by their text."""
    prompt_logprobs: int | None = Field(default=None, ge=0)
    """Return the prompt's log-probabilities with that many alternatives at each position (vLLM's)."""

    @model_validator(mode="after")
    def _a_stream_is_one(self) -> OpenAiBody:
        if not self.stream and (self.stream_options.include_usage or self.stream_options.continuous_usage_stats):
            raise ValueError("stream_options needs stream: true")
        if self.stream_options.continuous_usage_stats and not self.stream_options.include_usage:
            raise ValueError("continuous_usage_stats needs include_usage: true")
        if self.stream and self.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs comes without a stream only; leave stream out, or use echo with logprobs")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings; InvalidRequest or TooLarge."""
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if len(stops) > STOPS:
            raise TooLarge(f"stop has {len(stops)} strings, this teacher takes {STOPS}")
        for index, stop in enumerate(stops):
            if not stop:
                raise InvalidRequest(f"stop string {index} is empty, and would end a completion before it begins")
            if len(stop) > STOP_CHARACTERS:
                raise TooLarge(f"stop string {index} has {len(stop)} characters, this teacher takes {STOP_CHARACTERS}")
        return stops

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
                max_thinking_tokens=self.thinking_token_budget or 0,
            )
        except ValueError as error:
            raise InvalidSpec(str(error)) from error
