"""What stands before every route: a request id, keys, and an answer for what no handler caught.

A request that is refused is refused before its body is read. It knows no route, only their `access` decisions.
"""

from __future__ import annotations

import logging
import uuid

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from protos.errors import TeacherError, TeacherFailed
from teacher_server.auth import Authenticator
from teacher_server.metrics import Metrics
from teacher_server.transports import access, problems

log = logging.getLogger(__name__)


class RequestIds:
    """Gives every request an id, in its state and in the answer's X-Request-Id; answers what no handler caught."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = str(uuid.uuid4())
        scope.setdefault("state", {})["request_id"] = request_id
        begun = False

        async def send_with_id(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            log.debug("the client left request %s", request_id)
        except Exception:
            log.exception("%s %s failed (request %s)", scope["method"], scope["path"], request_id)
            if begun:
                raise
            await problems.respond(problems.problem(TeacherFailed(), request_id))(scope, receive, send_with_id)


class Gate:
    """Lets in who may come in, and puts who it is into the request's state; see `access`."""

    def __init__(self, app: ASGIApp, authenticator: Authenticator, metrics: Metrics) -> None:
        self._app, self._authenticator, self._metrics = app, authenticator, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            return
        decision = access.of_path(scope["path"])
        if not decision.open:
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            try:
                client = self._authenticator.identify(headers, (scope.get("client") or ("",))[0])
                client.require(decision.needs)
            except TeacherError as error:
                self._metrics.refused.labels("http", error.reason).inc()
                body = problems.of_path(scope["path"], problems.problem(error, scope["state"]["request_id"]))
                await problems.respond(body)(scope, receive, send)
                return
            scope["state"]["client"] = client
        await self._app(scope, receive, send)
