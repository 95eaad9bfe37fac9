"""What stands before every route: a request id, keys, and an answer for what no handler caught.

A request that is refused is refused before its body is read. It knows no route, only their `access` decisions.
"""

from __future__ import annotations

import base64
import binascii
import logging

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from protos.errors import TeacherError, TeacherFailed
from teacher_server import exchange
from teacher_server.auth import KEY_HEADER, Authenticator
from teacher_server.exchange import REQUEST_ID_HEADER
from teacher_server.metrics import Metrics
from teacher_server.transports import access, problems

log = logging.getLogger(__name__)

BASIC = 'Basic realm="strong2weak teacher: any name, and a key as the password", charset="UTF-8"'
"""What makes a browser ask for a key where there is a page for people."""


class RequestIds:
    """Gives every request an id, in its state and in the answer's X-Request-Id; answers what no handler caught."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        own = exchange.begin(headers)
        request_id = own.request_id
        scope.setdefault("state", {}).update(request_id=request_id, headers=headers)
        begun = False

        async def send_with_id(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                message["headers"] = [*message["headers"], (REQUEST_ID_HEADER.encode(), request_id.encode())]
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
        finally:
            self._metrics.count_bytes(own)


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
            headers = scope["state"]["headers"]
            browser = decision.browser and scope["method"] in ("GET", "HEAD")
            try:
                if browser:
                    headers = headers | _password_as_key(headers)
                client = self._authenticator.identify(headers, (scope.get("client") or ("",))[0])
                client.require(decision.needs)
            except TeacherError as error:
                self._metrics.refused.labels("http", error.reason).inc()
                body = problems.of_path(scope["path"], problems.problem(error, scope["state"]["request_id"]))
                response = problems.respond(body)
                if browser and body["status"] == 401:
                    response.headers.append("www-authenticate", BASIC)
                await response(scope, receive, send)
                return
            scope["state"]["client"] = client
        await self._app(scope, receive, send)


def _password_as_key(headers: dict[str, str]) -> dict[str, str]:
    """A key as programs send it, where a browser sent it as the password of HTTP Basic (RFC 7617)."""
    scheme, _, word = headers.get(KEY_HEADER, "").strip().partition(" ")
    if scheme.lower() != "basic":
        return {}
    try:
        _, _, password = base64.b64decode(word.strip(), validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return {}
    return {KEY_HEADER: f"Bearer {password}"}
