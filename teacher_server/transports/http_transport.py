"""HTTP: JSON for people, the contract's protobuf bytes for trainers, health, readiness and metrics.

Turns bodies into domain objects and back, finds out who is calling, and gives every error its problem details. A
protobuf call is one message in; its answer is a stream of frames (see protos/codec/status.py). It knows no engine.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import aclosing, asynccontextmanager
from typing import Any, Literal, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ValidationError

from protos import codec
from protos.errors import InvalidRequest, TooLarge, Unavailable, Unsupported
from protos.scores import Completion, CompletionDelta, Field, ScoreRequest, Scores
from teacher_server import checks
from teacher_server.auth import Authenticator, Caller, Client
from teacher_server.calls import RETRY_S
from teacher_server.config_sections import LimitsConfig
from teacher_server.exchange import current
from teacher_server.service import TeacherService
from teacher_server.transports import problems, schemas
from teacher_server.transports.completions import collect
from teacher_server.transports.http_stream import read_body, stream, while_connected
from teacher_server.transports.reading import Reading

PROTOBUF = "application/x-protobuf"
SSE = "text/event-stream"
TIMEOUT_HEADER = "x-timeout-s"
"""Request header with the seconds after which the caller has no use for the answer."""
IN_THREAD = 1 << 14
"""Bytes of a body, or numbers of an answer, from which it is made into objects, or text, off the event loop."""
Model = TypeVar("Model", bound=BaseModel)
Item = TypeVar("Item")
Kind = Literal["protobuf", "json"]


class UnsupportedMediaType(InvalidRequest):
    """A body of a type that no route reads: 415 with a reason of its own, which no gRPC call has."""

    http_status = 415


def media_type(request: Request) -> Kind:
    """What the body is; a missing Content-Type means JSON."""
    given = request.headers.get("content-type", "application/json").split(";")[0].strip().lower()
    if given == PROTOBUF:
        return "protobuf"
    if given == "application/json" or given.endswith("+json"):
        return "json"
    raise UnsupportedMediaType(f"the body is {given or 'of no type'}; send application/json or {PROTOBUF}")


def parse(model: type[Model], body: bytes) -> Model:
    """The model of a JSON body; InvalidRequest where it is none."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise problems.invalid_body(error, model) from error


async def off_loop(size: int, work: Callable[[], Item]) -> Item:
    """What `work` gives, in a thread where it is large, so that others are not kept waiting."""
    return work() if size < IN_THREAD else await asyncio.to_thread(work)


def json_response(content: Any) -> Response:
    """A JSON answer, encoded once; FastAPI's own encoder is ten times slower on long lists."""
    with current().writing():
        return json_text(json.dumps(content, allow_nan=False))


def json_text(content: str) -> Response:
    """A JSON answer that is text already."""
    return Response(content, media_type="application/json")


def event(data: Any, name: str = "") -> bytes:
    """One server-sent event."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(data, allow_nan=False)}\n\n".encode()


class Http:
    """What every route needs."""

    def __init__(
        self,
        service: TeacherService,
        authenticator: Authenticator,
        max_request_bytes: int,
        limits: LimitsConfig,
        reading: Reading,
    ) -> None:
        self.service = service
        self.authenticator = authenticator
        self.max_request_bytes = max_request_bytes
        self.limits = limits
        self._reading = reading

    def caller(self, request: Request, transport: str = "http") -> Caller:
        """Who calls, until when; InvalidRequest for a deadline that is no number."""
        client: Client = request.state.client
        timeout = request.headers.get(TIMEOUT_HEADER)
        try:
            seconds = None if timeout is None else float(timeout)
        except ValueError:
            seconds = -1.0
        if seconds is not None and not 0 <= seconds < float("inf"):
            raise InvalidRequest(f"{TIMEOUT_HEADER} must be a number of seconds, got {timeout!r}")
        return Caller.of(client, transport, seconds)

    @asynccontextmanager
    async def body(self, request: Request, kind: Kind = "json") -> AsyncIterator[bytes]:
        """The body within its kind's limit; counted as being received until it has been made into objects."""
        most = self.max_request_bytes
        if kind == "json":
            most = min(most, self.limits.json_mib << 20)
        with self._reading.hold() as add:
            yield await read_body(request, most, add)

    async def parsed(self, request: Request, model: type[Model]) -> Model:
        """The model of a JSON body."""
        async with self.body(request) as body:
            return await off_loop(len(body), current().reads(lambda: parse(model, body)))


def make_router(http: Http) -> APIRouter:
    """The routes of the contract."""
    router = APIRouter(tags=["teacher"])
    service = http.service

    @router.get("/v1/teacher", response_model=schemas.TeacherAnswer, openapi_extra=_binary_answer())
    async def get_teacher(request: Request) -> Any:
        """What the teacher is, what it accepts and what it can do."""
        http.caller(request)
        info = service.teacher()
        if PROTOBUF in request.headers.get("accept", ""):
            return Response(codec.encode_teacher(info).SerializeToString(), media_type=PROTOBUF)
        return schemas.teacher(info)

    @router.post("/v1/score", response_model=schemas.ScoreAnswer, openapi_extra=_body("ScoreBody"))
    async def score(request: Request) -> Response:
        """The teacher's log-probabilities of tokens that already exist."""
        caller, kind = http.caller(request), media_type(request)
        if kind == "protobuf":
            with service.decoding("score", caller):
                async with http.body(request, kind) as body:
                    read = caller.exchange.reads(lambda: _score_request(body, http.max_request_bytes))
                    call = await off_loop(len(body), read)
            return await stream(
                request,
                service.score(call, caller),
                lambda item: (codec.frame(m.SerializeToString()) for m in codec.encode_scores(*item)),
                media_type=PROTOBUF,
                on_error=lambda error: codec.frame_error(error, caller.request_id),
            )
        with service.decoding("score", caller):
            async with http.body(request) as body:
                info, text = service.teacher(), service.text  # now: later the server may be draining
                call = await off_loop(len(body), caller.exchange.reads(lambda: _score_call(service, body)))
            if Field.HIDDEN_STATES in call.spec.want:
                raise Unsupported(f"hidden_states are too large for JSON; send the call as {PROTOBUF}")
            numbers = schemas.answer_numbers(call)
            if numbers > http.limits.json_numbers:
                raise TooLarge(
                    f"the answer would have {numbers} numbers, this server writes {http.limits.json_numbers} as JSON; "
                    f"ask for less, or send the call as {PROTOBUF}"
                )
        scores = await while_connected(request, _all_scores(service, call, caller))

        def answer() -> str:
            sequences = (schemas.scored(one, i, scores[i], text.decode) for i, one in enumerate(call.sequences))
            return f'{{"fingerprint": {json.dumps(info.fingerprint)}, "sequences": [{", ".join(sequences)}]}}'

        return json_text(await off_loop(numbers, caller.exchange.writes(answer)))

    @router.post("/v1/generate", response_model=schemas.GenerateAnswer, openapi_extra=_body("GenerateBody"))
    async def generate(request: Request) -> Response:
        """Completions of prompts, whole or streamed."""
        caller, kind = http.caller(request), media_type(request)
        if kind == "protobuf":
            with service.decoding("generate", caller):
                async with http.body(request, kind) as body:
                    read = caller.exchange.reads(lambda: codec.decode_generate_request_bytes(body))
                    call = await off_loop(len(body), read)
            return await stream(
                request,
                service.generate(call, caller),
                lambda deltas: [codec.frame(codec.encode_deltas(deltas).SerializeToString())],
                media_type=PROTOBUF,
                on_error=lambda error: codec.frame_error(error, caller.request_id),
            )
        with service.decoding("generate", caller):
            info = service.teacher()
            call = (await http.parsed(request, schemas.GenerateBody)).request()
        if call.stream:
            return await stream(
                request,
                service.generate(call, caller),
                _delta_events,
                media_type=SSE,
                on_error=lambda error: event(problems.problem(error, caller.request_id), "error"),
                last=lambda: [event({}, "done")],
            )
        completions = await while_connected(request, collect(service, call, caller))
        answers = [
            _completion(prompt, sample, completion)
            for prompt, row in enumerate(completions)
            for sample, completion in enumerate(row)
        ]
        return json_response({"fingerprint": info.fingerprint, "completions": answers})

    @router.get("/v1/head", response_class=Response, openapi_extra=_binary_answer())
    async def get_head(request: Request, fingerprint: str = "") -> Response:
        """The LM head over the real vocabulary, as frames of teacher.v1.GetHeadResponse; see hidden_states."""
        caller = http.caller(request)
        return await stream(
            request,
            service.head(fingerprint, caller),
            lambda part: [codec.frame(codec.encode_head(part).SerializeToString())],
            media_type=PROTOBUF,
            on_error=lambda error: codec.frame_error(error, caller.request_id),
        )

    @router.get("/health", tags=["operation"], response_class=PlainTextResponse)
    async def health() -> PlainTextResponse:
        """Whether the process lives, loading and draining included."""
        return PlainTextResponse("ok\n")

    @router.get("/ready", tags=["operation"], response_class=PlainTextResponse)
    async def ready() -> Response:
        """Whether calls are answered; 503 with the reason where not."""
        reason = await service.why_not_ready()
        if reason:
            raise Unavailable(f"{reason}; retry later", retry_after_s=RETRY_S)
        return PlainTextResponse("ready\n")

    @router.get("/status", tags=["operation"])
    async def status() -> dict[str, Any]:
        """What the page at / and `python -m teacher_server top` show: clients, rates, queue, engine, last errors."""
        return dataclasses.asdict(await service.status())

    @router.get("/metrics", tags=["operation"], response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Numbers in Prometheus' text format."""
        service.metrics.ready.set(not await service.why_not_ready())
        return Response(service.metrics.text(), headers={"content-type": service.metrics.content_type})

    return router


def _score_request(body: bytes, max_bytes: int) -> ScoreRequest:
    reader = codec.ScoreRequestReader(max_bytes)
    reader.add_bytes(body)
    return reader.finish()


def _score_call(service: TeacherService, body: bytes) -> ScoreRequest:
    parsed = parse(schemas.ScoreBody, body)
    checks.check_sequences(len(parsed.sequences), service.teacher())
    return parsed.request(service.tokenize)


async def _all_scores(service: TeacherService, call: ScoreRequest, caller: Caller) -> dict[int, Scores]:
    async with aclosing(service.score(call, caller)) as results:
        return {index: scores async for index, scores in results}


def _delta_events(deltas: list[CompletionDelta]) -> Iterable[bytes]:
    yield event({"deltas": [schemas.delta(piece) for piece in deltas]})


def _completion(prompt: int, sample: int, completion: Completion) -> dict[str, Any]:
    return {
        "prompt_index": prompt,
        "sample_index": sample,
        "text": completion.text,
        "finish_reason": completion.finish_reason.value,
        "token_ids": completion.token_ids.tolist(),
        "logprobs": None if completion.logprobs is None else completion.logprobs.tolist(),
        "prompt_token_ids": completion.prompt_token_ids.tolist(),
    }


def json_body(schema: str) -> dict[str, Any]:
    """OpenAPI's description of a JSON body that the handler reads itself."""
    reference = {"schema": {"$ref": f"#/components/schemas/{schema}"}}
    return {"requestBody": {"required": True, "content": {"application/json": reference}}}


def _body(schema: str) -> dict[str, Any]:
    """OpenAPI's description of a body that the handler reads itself, as JSON or as one protobuf message."""
    body = json_body(schema)
    body["requestBody"]["content"][PROTOBUF] = {"schema": {"type": "string", "format": "binary"}}
    return body | _binary_answer()


def _binary_answer() -> dict[str, Any]:
    return {"responses": {"200": {"content": {PROTOBUF: {"schema": {"type": "string", "format": "binary"}}}}}}
