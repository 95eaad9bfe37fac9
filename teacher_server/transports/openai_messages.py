"""A chat's messages and template arguments, as OpenAI's and vLLM's clients send them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import model_validator

from protos import scores as domain
from protos.errors import InvalidRequest, Unsupported
from teacher_server.transports.problems import short
from teacher_server.transports.schemas import FIRST, Body

EMPTY = ("annotations", "audio", "function_call", "refusal", "tool_calls")
"""Members of an answer's message that come back in the next call; this teacher takes them empty."""


class ContentPart(Body):
    """One part of a message's content; text alone is taken."""

    type: str
    text: str = ""


class ChatMessage(Body):
    """One turn of a conversation."""

    role: str
    """Speaker: system, user, assistant or tool."""
    content: str | Annotated[list[ContentPart], FIRST] = ""
    """Text, or a list of text parts."""
    reasoning: str = ""
    """What an assistant thought before its answer; it goes before the content in think tags, as the model wrote it."""

    @model_validator(mode="before")
    @classmethod
    def _as_answered(cls, values: Any) -> Any:
        """Takes a message as an answer had it, and vLLM's older name of `reasoning`."""
        if not isinstance(values, dict):
            return values
        kept = {name: value for name, value in values.items() if value is not None}
        for name in EMPTY:
            if kept.pop(name, None):
                raise Unsupported(f"this teacher does not have {name} in messages; put it into the content")
        if "reasoning_content" in kept:
            kept.setdefault("reasoning", kept.pop("reasoning_content"))
        if "content" not in kept and not kept.get("reasoning"):
            raise ValueError("a message needs content")
        return kept

    def message(self, index: int) -> domain.Message:
        """The domain's turn; Unsupported for parts that are no text."""
        parts = [self.content] if isinstance(self.content, str) else [_text(index, part) for part in self.content]
        if self.reasoning and self.role != "assistant":
            raise InvalidRequest(f"message {index} has reasoning, but its role is {short(self.role)}")
        thought = f"<think>\n{self.reasoning.strip()}\n</think>\n\n" if self.reasoning else ""
        return domain.Message(self.role, thought + "".join(parts))


def _text(index: int, part: ContentPart) -> str:
    if part.type != "text":
        raise Unsupported(f"message {index} has a part of type {short(part.type)}; this teacher reads text")
    return part.text


def chat_prompt(messages: list[ChatMessage], template_kwargs: dict[str, Any]) -> domain.Prompt:
    """The domain's prompt; Unsupported for template arguments other than enable_thinking."""
    others = set(template_kwargs) - {"enable_thinking"}
    if others:
        raise Unsupported(f"chat_template_kwargs takes enable_thinking alone, got {', '.join(sorted(others)[:5])}")
    thinking = template_kwargs.get("enable_thinking")
    if thinking not in (None, True, False):
        raise InvalidRequest(f"enable_thinking must be true or false, got {short(thinking)}")
    mode = None if thinking is None else domain.Mode.THINKING if thinking else domain.Mode.NON_THINKING
    return domain.Prompt(tuple(message.message(index) for index, message in enumerate(messages)), mode=mode)
