"""The FastAPI application: the routes, a request id for each request, and problem details for whatever goes wrong.

It knows no message and no engine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException

from protos.errors import InvalidRequest, TeacherError
from teacher_server.auth import TrustingAuthenticator
from teacher_server.config_sections import LimitsConfig
from teacher_server.metrics import Metrics
from teacher_server.service import ServiceSettings, TeacherService
from teacher_server.transports import (
    docs_page,
    http_transport,
    live_page,
    openai_api,
    problems,
    schemas,
)
from teacher_server.transports.http_gate import Gate, RequestIds
from teacher_server.transports.reading import Reading

STREAMED = ("/v1/generate", "/v1/completions", "/v1/chat/completions")
"""Routes that answer with server-sent events where the body says `stream`."""


def create_app(http: http_transport.Http) -> FastAPI:
    """The application of one service."""
    app = FastAPI(
        title="strong2weak teacher",
        description="Scores and completions of one teacher model. Errors are RFC 9457 problem details.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.include_router(http_transport.make_router(http))
    app.include_router(openai_api.make_router(http))
    app.add_exception_handler(TeacherError, _teacher_error)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, _validation_error)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, _http_error)  # type: ignore[arg-type]
    app.openapi = _openapi(app)  # type: ignore[method-assign]

    document, headers = live_page.page()

    @app.get("/", include_in_schema=False)
    async def live() -> HTMLResponse:
        return HTMLResponse(document, headers=headers)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(docs_page.render(app.openapi()))

    app.add_middleware(Gate, authenticator=http.authenticator, metrics=http.service.metrics)
    app.add_middleware(RequestIds, metrics=http.service.metrics)
    return app


def describe_routes() -> list[tuple[str, str, str]]:
    """(method, path, meaning) of every route, for the reference page."""
    service = TeacherService(ServiceSettings(), Metrics())
    document = create_app(
        http_transport.Http(service, TrustingAuthenticator(), 0, LimitsConfig(), Reading(0, 1, 1))
    ).openapi()
    return [
        (method.upper(), path, route["description"])
        for path, methods in document["paths"].items()
        for method, route in methods.items()
    ] + [
        ("GET", "/", "A live page for people."),
        ("GET", "/docs", "The routes as a page."),
        ("GET", "/openapi.json", "The routes for programs."),
    ]


async def _teacher_error(request: Request, error: TeacherError) -> Response:
    if isinstance(error, http_transport.UnsupportedMediaType):
        return await _http_error(request, HTTPException(error.http_status, error.message))
    return _respond(request, problems.problem(error, request.state.request_id))


async def _validation_error(request: Request, error: RequestValidationError) -> Response:
    return await _teacher_error(request, InvalidRequest(problems.explain(list(error.errors()))))


async def _http_error(request: Request, error: HTTPException) -> Response:
    detail = str(error.detail)
    if error.status_code == 404:
        detail = f"there is nothing at {request.url.path}; /docs lists what there is"
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        detail = f"{request.url.path} does not take {request.method}; use {allowed}"
    reason = problems.framework_reason(error.status_code)
    body = problems.members(error.status_code, reason, detail, request.state.request_id)
    return _respond(request, body, dict(error.headers or {}))


def _respond(request: Request, body: dict[str, Any], headers: dict[str, str] | None = None) -> Response:
    return problems.respond(problems.of_path(request.url.path, body), headers)


def _openapi(app: FastAPI) -> Callable[[], dict[str, Any]]:
    """OpenAPI with the models of the bodies that handlers read themselves, and problems as what else is answered."""

    def build() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            bodies = (schemas.ScoreBody, schemas.GenerateBody, *openai_api.BODIES)
            models = [(body, "validation") for body in bodies]
            _, extra = models_json_schema(models, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
            parts = document.setdefault("components", {}).setdefault("schemas", {})
            parts.update(extra["$defs"])
            parts["Problem"] = problems.SCHEMA
            for operation in (one for path in document["paths"].values() for one in path.values()):
                operation["responses"].pop("422", None)
                operation["responses"]["default"] = problems.RESPONSE
            for path in STREAMED:
                document["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"] = {}
            for unused in ("HTTPValidationError", "ValidationError"):
                parts.pop(unused, None)
            app.openapi_schema = document
        return app.openapi_schema

    return build
