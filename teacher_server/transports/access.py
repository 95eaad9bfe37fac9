"""Who may come in where: every route and every gRPC method is open, or needs a key, or a key that allows something.

A path or method that is not named here needs a key, and the tests refuse a route without a decision. It knows paths and
names alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from teacher_server.auth import Permission


@dataclass(frozen=True)
class Access:
    """A decision: open to everybody, else for known clients who may do `needs` (None: whoever is known).

    `browser`: a page for people, whose GET may also bring the key as the password of HTTP Basic, which browsers ask for
    themselves. Nothing else may: a browser adds such a password to whatever any page in it sends.
    """

    open: bool = False
    needs: Permission | None = None
    browser: bool = False


OPEN, KNOWN = Access(open=True), Access()
SCORE, GENERATE, OBSERVE = (Access(needs=permission) for permission in Permission)
PAGE = Access(needs=Permission.OBSERVE, browser=True)

HTTP: dict[str, Access] = {
    "/health": OPEN,
    "/ready": OPEN,  # says what grpc.health.v1 says
    "/v1/teacher": KNOWN,
    "/v1/models": KNOWN,
    "/v1/score": SCORE,
    "/v1/head": SCORE,
    "/v1/generate": GENERATE,
    "/v1/completions": GENERATE,
    "/v1/chat/completions": GENERATE,
    "/tokenize": GENERATE,  # goes with the routes above
    "/detokenize": GENERATE,
    "/": PAGE,
    "/status": PAGE,
    "/metrics": PAGE,
    "/docs": PAGE,
    "/openapi.json": PAGE,
}
_TEACHER = "/teacher.v1.TeacherService/"
_HEALTH = "/grpc.health.v1.Health/"
GRPC: dict[str, Access] = {
    _TEACHER + "GetTeacher": KNOWN,
    _TEACHER + "Score": SCORE,
    _TEACHER + "GetHead": SCORE,
    _TEACHER + "Generate": GENERATE,
    _HEALTH + "Check": OPEN,
    _HEALTH + "List": OPEN,
    _HEALTH + "Watch": OPEN,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": OBSERVE,
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo": OBSERVE,
}


def of_path(path: str) -> Access:
    """The decision for an HTTP path."""
    return HTTP.get(path, KNOWN)


def of_method(method: str) -> Access:
    """The decision for a full gRPC method name, `/package.Service/Method`."""
    return GRPC.get(method, KNOWN)
