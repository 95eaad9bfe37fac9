"""/tokenize and /detokenize in vLLM's shapes: what the teacher's tokenizer and template make of a text or a chat."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from protos import scores as domain
from protos.errors import TeacherMismatch, TooLarge
from teacher_server import checks
from teacher_server.service import TeacherService
from teacher_server.transports.openai_body import HonestBody
from teacher_server.transports.openai_messages import ChatMessage, chat_prompt
from teacher_server.transports.schemas import FIRST, Id


class TokenizeBody(HonestBody):
    """A call of /tokenize: a text or the messages of a chat."""

    prompt: str | None = None
    """Text."""
    messages: Annotated[list[ChatMessage], FIRST] = Field(default=[])
    """Turns of a conversation, rendered by the template."""
    add_special_tokens: bool | None = None
    """Add what the tokenizer puts around a text; unset means true for a text and false for a chat."""
    add_generation_prompt: bool = True
    """Open the assistant's turn after the messages."""
    chat_template_kwargs: dict[str, Any] = Field(default={})
    """`enable_thinking`, true or false, chooses the mode."""
    return_token_strs: bool = False
    """Return the vocabulary's own name of each token too."""

    @model_validator(mode="after")
    def _one_of_two(self) -> TokenizeBody:
        if (self.prompt is None) == (not self.messages):
            raise ValueError("give prompt or messages, one of them")
        if self.messages and self.add_special_tokens:
            raise ValueError("add_special_tokens goes with a prompt; a chat's special tokens are the template's")
        return self


class DetokenizeBody(HonestBody):
    """A call of /detokenize."""

    tokens: Annotated[list[Id], FIRST]
    """Token ids."""


def tokenize(service: TeacherService, body: TokenizeBody) -> dict[str, Any]:
    """The answer of /tokenize; InvalidSequence where the template refuses the messages."""
    check_model(service, body.model)
    special, text = body.add_special_tokens is not False, service.text
    if body.messages:
        prompt = chat_prompt(body.messages, body.chat_template_kwargs)
        ids = service.tokenize(0, prompt, opening=body.add_generation_prompt)
    elif body.prompt:
        ids = service.tokenize(0, domain.Prompt(text=body.prompt), special=special)
    else:
        ids = text.encode("", special=special)
    return {
        "count": len(ids),
        "max_model_len": service.teacher().limits.sequence_tokens,
        "tokens": ids.tolist(),
        "token_strs": text.pieces(ids) if body.return_token_strs else None,
    }


def detokenize(service: TeacherService, body: DetokenizeBody) -> dict[str, Any]:
    """The answer of /detokenize, special tokens included; InvalidSequence for an id outside the vocabulary."""
    check_model(service, body.model)
    info, ids = service.teacher(), domain.ids_array(body.tokens)
    most = checks.TEXT_FACTOR * info.limits.sequence_tokens
    if len(ids) > most:
        raise TooLarge(f"tokens has {len(ids)} ids, this teacher reads {most}; split the call")
    checks.check_ids(ids, info.vocab_size, "tokens", 0)
    return {"prompt": service.text.decode(ids, special=True)}


def check_model(service: TeacherService, name: str) -> None:
    """TeacherMismatch where a call names another model than is served."""
    served = service.teacher().name
    if name and name != served:
        raise TeacherMismatch(f"the call names the model {name!r}, this server serves {served!r}")
