"""The OpenAI-shaped routes: /v1/models, /v1/completions and /v1/chat/completions, over the same service.

It knows no engine. Errors are the same problem details as elsewhere, with OpenAI's `error` member in them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastapi import APIRouter, Request, Response

from teacher_server.auth import Caller
from teacher_server.transports import problems
from teacher_server.transports.http_stream import stream, while_connected
from teacher_server.transports.http_transport import SSE, Http, event, json_body, json_response, off_loop
from teacher_server.transports.openai_calls import OpenAiCall, Wish, chat_wish, completion_wish
from teacher_server.transports.openai_schemas import ChatBody, CompletionBody, OpenAiBody


def make_router(http: Http) -> APIRouter:
    """The routes."""
    router = APIRouter(tags=["openai"])
    service = http.service

    async def answer(request: Request, caller: Caller, body: OpenAiBody, wish: Wish) -> Response:
        size = sum(len(one.text) + sum(len(turn.content) for turn in one.messages) for one in wish.prompts)
        call = await off_loop(size, lambda: OpenAiCall(service, caller, body, wish))
        if not body.stream:
            return json_response(await while_connected(request, call.whole()))

        def last() -> Iterable[bytes]:
            yield from map(event, call.last_chunks())
            yield b"data: [DONE]\n\n"

        return await stream(
            request,
            service.generate(call.request(), caller),
            lambda deltas: map(event, call.chunks(deltas)),
            media_type=SSE,
            on_error=lambda error: event(problems.with_openai_error(problems.problem(error, caller.request_id))),
            last=last,
        )

    @router.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        """The one model that is served."""
        http.caller(request, "openai")
        info = service.teacher()
        model = {"id": info.name, "object": "model", "created": 0, "owned_by": "strong2weak"}
        return {"object": "list", "data": [model | {"max_model_len": info.limits.sequence_tokens}]}

    @router.post("/v1/completions", openapi_extra=json_body("CompletionBody"))
    async def completions(request: Request) -> Response:
        """Completions of text or tokens, with echo, logprobs and prompt_logprobs; no chat template."""
        caller = http.caller(request, "openai")
        body = await http.parsed(request, CompletionBody)
        return await answer(request, caller, body, completion_wish(body))

    @router.post("/v1/chat/completions", openapi_extra=json_body("ChatBody"))
    async def chat(request: Request) -> Response:
        """A completion of a conversation; chat_template_kwargs.enable_thinking chooses the mode."""
        caller = http.caller(request, "openai")
        body = await http.parsed(request, ChatBody)
        return await answer(request, caller, body, chat_wish(body))

    return router
