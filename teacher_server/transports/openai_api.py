"""The OpenAI-shaped routes: models, completions, chats and the tokenizer, over the same service.

It knows no engine. Errors are the same problem details as elsewhere, with OpenAI's `error` member in them.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from protos.scores import CompletionDelta
from teacher_server.auth import Caller
from teacher_server.service import TeacherService
from teacher_server.transports import openai_tokens, problems
from teacher_server.transports.completions import gather
from teacher_server.transports.http_stream import stream, while_connected
from teacher_server.transports.http_transport import (
    SSE,
    Http,
    Model,
    event,
    json_body,
    json_response,
    json_text,
    off_loop,
    parse,
)
from teacher_server.transports.openai_body import OpenAiBody
from teacher_server.transports.openai_calls import OpenAiCall, Wish, chat_wish, completion_wish
from teacher_server.transports.openai_choices import Choices
from teacher_server.transports.openai_schemas import ChatBody, CompletionBody
from teacher_server.transports.openai_tokens import DetokenizeBody, TokenizeBody

BODIES: tuple[type[BaseModel], ...] = (CompletionBody, ChatBody, TokenizeBody, DetokenizeBody)
"""Bodies that the handlers read themselves."""


def make_router(http: Http) -> APIRouter:
    """The routes."""
    router = APIRouter(tags=["openai"])
    service = http.service

    async def begun(
        request: Request, caller: Caller, model: type[Model], wish_of: Callable[[Model], Wish]
    ) -> OpenAiCall:
        with service.decoding("generate", caller):
            body = await http.parsed(request, model)
            assert isinstance(body, OpenAiBody)
            wish = wish_of(body)
            return await off_loop(
                wish.characters, lambda: OpenAiCall(service, caller, body, wish, http.limits.json_numbers)
            )

    async def answer(
        request: Request, caller: Caller, model: type[Model], wish_of: Callable[[Model], Wish]
    ) -> Response:
        call = await begun(request, caller, model, wish_of)
        choices = Choices(call, caller.request_id)
        if not call.body.stream:
            completions = await while_connected(request, gather(call.deltas(), len(call.prompts), call.body.n))
            write = caller.exchange.writes(lambda: json.dumps(choices.whole(completions), allow_nan=False))
            return json_text(await off_loop(call.numbers, write))

        def last() -> Iterable[bytes]:
            yield from map(event, choices.last_chunks())
            yield b"data: [DONE]\n\n"

        return await stream(
            request,
            _named(call, choices),
            lambda deltas: map(event, choices.chunks(deltas)),
            media_type=SSE,
            on_error=lambda error: event(problems.with_openai_error(problems.problem(error, caller.request_id))),
            last=last,
        )

    async def text_call(
        request: Request, method: str, model: type[Model], make: Callable[[TeacherService, Model], dict[str, Any]]
    ) -> Response:
        """Answers what needs the tokenizer alone."""
        caller = http.caller(request, "openai")
        with service.serving(method, caller):
            async with http.body(request) as body:
                read = caller.exchange.reads(lambda: make(service, parse(model, body)))
                found = await off_loop(len(body), read)
        return json_response(found)

    @router.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        """The one model that is served."""
        http.caller(request, "openai")
        info = service.teacher()
        model = {"id": info.name, "object": "model", "created": 0, "owned_by": "strong2weak", "root": info.name}
        more: dict[str, Any] = {"parent": None, "max_model_len": info.limits.sequence_tokens, "permission": []}
        return {"object": "list", "data": [model | more]}

    @router.post("/v1/completions", openapi_extra=json_body("CompletionBody"))
    async def completions(request: Request) -> Response:
        """Completions of text or tokens, with echo, logprobs and prompt_logprobs; no chat template."""
        return await answer(request, http.caller(request, "openai"), CompletionBody, completion_wish)

    @router.post("/v1/chat/completions", openapi_extra=json_body("ChatBody"))
    async def chat(request: Request) -> Response:
        """A completion of a conversation; chat_template_kwargs.enable_thinking chooses the mode."""
        return await answer(request, http.caller(request, "openai"), ChatBody, chat_wish)

    @router.post("/tokenize", openapi_extra=json_body("TokenizeBody"))
    async def tokenize(request: Request) -> Response:
        """Token ids of a text, or of a conversation as the template renders it."""
        return await text_call(request, "tokenize", TokenizeBody, openai_tokens.tokenize)

    @router.post("/detokenize", openapi_extra=json_body("DetokenizeBody"))
    async def detokenize(request: Request) -> Response:
        """The text of token ids, special tokens included."""
        return await text_call(request, "detokenize", DetokenizeBody, openai_tokens.detokenize)

    return router


async def _named(call: OpenAiCall, choices: Choices) -> AsyncGenerator[list[CompletionDelta], None]:
    """The call's pieces; a long echo gets its names in a thread, before the loop writes it."""
    named = False
    async with aclosing(call.deltas()) as pieces:
        async for deltas in pieces:
            if not named and call.echoed_logprobs:
                await asyncio.to_thread(choices.name_prompts)
            named = True
            yield deltas
