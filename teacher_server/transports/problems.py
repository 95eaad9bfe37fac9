"""Errors on HTTP: RFC 9457 problem details for every class of the tree and for what the web framework refuses.

It knows the error table's attributes and no route.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from pydantic import BaseModel, ValidationError
from starlette.responses import Response

from protos.errors import DOMAIN, InvalidRequest, TeacherError, reason_of

MEDIA_TYPE = "application/problem+json"
SHOWN = 5
"""Faults of a body that a problem names."""
OPENAI_PATHS = frozenset({"/v1/models", "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"})
"""Routes whose callers look for OpenAI's `error` member."""

SCHEMA: dict[str, Any] = {
    "title": "Problem",
    "description": "RFC 9457 problem details; docs/api.md lists the reasons.",
    "type": "object",
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer", "minimum": 400, "maximum": 599},
        "detail": {"type": "string", "description": "What was wrong, with the numbers, and what to do."},
        "instance": {"type": "string", "description": "The call's id, as urn:uuid:..."},
        "reason": {"type": "string"},
        "index": {"type": "integer", "minimum": 0, "description": "The sequence or prompt that was wrong."},
        "retry_after_s": {"type": "number", "minimum": 0, "description": "Seconds after which to try again."},
        "error": {"type": "object", "description": "The same for OpenAI's clients, on routes of that shape."},
    },
    "required": ["type", "title", "status", "detail", "instance", "reason"],
    "additionalProperties": False,
}
"""Every problem, as JSON Schema."""
RESPONSE: dict[str, Any] = {
    "description": "A problem: the call was refused, or failed.",
    "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
}
"""It as a response of OpenAPI."""


def problem(error: TeacherError, request_id: str) -> dict[str, Any]:
    """An error's problem details; `reason`, `index` and `retry_after_s` say what ErrorInfo and RetryInfo say."""
    body = members(error.http_status, error.reason, error.message, request_id)
    if error.index is not None:
        body["index"] = error.index
    if error.retry_after_s is not None:
        body["retry_after_s"] = round(error.retry_after_s, 3)
    return body


def members(status: int, reason: str, detail: str, request_id: str) -> dict[str, Any]:
    """The members that every problem has."""
    return {
        "type": f"{DOMAIN}:{reason.lower().replace('_', '-')}",
        "title": reason.replace("_", " ").capitalize(),
        "status": status,
        "detail": detail,
        "instance": f"urn:uuid:{request_id}",
        "reason": reason,
    }


def respond(body: dict[str, Any], headers: dict[str, str] | None = None) -> Response:
    """The response of a problem, with Retry-After in whole seconds where there is a delay."""
    headers = dict(headers or {})
    if "retry_after_s" in body:
        headers["retry-after"] = str(max(1, math.ceil(body["retry_after_s"])))
    if "error" in body:  # OpenAI's clients would try again whatever is 5xx
        headers["x-should-retry"] = "true" if "retry_after_s" in body else "false"
    if body["status"] == HTTPStatus.UNAUTHORIZED:
        headers.setdefault("www-authenticate", "Bearer")
    return Response(json.dumps(body), body["status"], headers, MEDIA_TYPE)


def of_path(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The problem as a route's callers expect it."""
    return with_openai_error(body) if path in OPENAI_PATHS else body


def with_openai_error(body: dict[str, Any]) -> dict[str, Any]:
    """The problem with the member that OpenAI's clients look for; it says the same."""
    return body | {
        "error": {"message": body["detail"], "type": body["reason"].lower(), "param": None, "code": body["status"]}
    }


def framework_reason(status: int) -> str:
    """The reason of a status that no class of the tree has, such as NOT_FOUND."""
    return reason_of(InvalidRequest) if status == HTTPStatus.BAD_REQUEST else HTTPStatus(status).name


def explain(faults: list[Any], known: Mapping[str, list[str]] | None = None) -> str:
    """pydantic's faults in one line: where, what, and what was given; unknown members with what may have been meant.

    `known` is the body's `places`. Where it is given, a fault's place is made of these names and of numbers alone:
    pydantic puts names of our classes in.
    """
    known, lines = known or {}, []
    for fault in faults[:SHOWN]:
        path = [part for part in fault["loc"] if part != "body"]
        last = path[-1:] if fault["type"] == "extra_forbidden" else []
        if known:
            path = [part for part in path[: len(path) - len(last)] if isinstance(part, int) or part in known] + last
        where = ".".join(map(str, path)) or "body"
        if last:
            lines.append(f"unknown member {where}{_meant(str(last[0]), path[:-1], known)}")
            continue
        given = "" if fault["type"] in ("missing", "value_error", "json_invalid") else f", got {short(fault['input'])}"
        what = "Input should be an object" if fault["type"] in ("model_type", "dict_type") else str(fault["msg"])
        lines.append(f"{where}: {what.removeprefix('Value error, ')}{given}")
    return "; ".join(lines) + (f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else "")


def _meant(name: str, parents: list[Any], known: Mapping[str, list[str]]) -> str:
    """Where a member of that name belongs, or which one it resembles, first of those beside it."""
    if name in known:
        return f"; it belongs in {' or '.join(at if '.' in at else 'the body itself' for at in known[name])}"
    inside = "".join("[i]" if isinstance(part, int) else f".{part}" for part in parents).removeprefix(".")
    beside = [own for own, at in known.items() if (f"{inside}.{own}" if inside else own) in at]
    for names in (beside, list(known)):
        for close in difflib.get_close_matches(name, names, n=1, cutoff=0.5):
            return f", did you mean {close if names is beside else ' or '.join(known[close])}"
    return ""


def places(schema: dict[str, Any]) -> dict[str, list[str]]:
    """All members of a JSON Schema's object, by name, with where each stands: `sequences[i].score_start`."""
    found: dict[str, list[str]] = {}

    def walk(part: dict[str, Any], at: str, outer: tuple[str, ...]) -> None:
        reference = part.get("$ref", "")
        if reference in outer:
            return
        if reference:
            walk(schema["$defs"][reference.rpartition("/")[2]], at, (*outer, reference))
        for choice in (*part.get("anyOf", ()), *part.get("oneOf", ())):
            walk(choice, at, outer)
        if isinstance(part.get("items"), dict):
            walk(part["items"], f"{at}[i]", outer)
        for name, member in part.get("properties", {}).items():
            place = f"{at}.{name}" if at else name
            if place not in found.setdefault(name, []):
                found[name].append(place)
            walk(member, place, outer)

    walk(schema, "", ())
    return found


def invalid_body(error: ValidationError, model: type[BaseModel]) -> InvalidRequest:
    """The tree's error for a JSON body that `model` refuses."""
    faults: list[Any] = list(error.errors(include_url=False, include_context=False))
    return InvalidRequest(explain(faults, places(model.model_json_schema())))


def short(value: object) -> str:
    """A value as a problem shows it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
