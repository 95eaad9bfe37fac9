"""The errors of stock servers as those of the tree: a status, and the text of an OpenAI-shaped `error` member.

Nothing else reads their bodies. A stock server says less than a teacher of ours: what is no more than a status and a
text is told by these.
"""

from __future__ import annotations

import json
import re
from typing import Any

import httpx

from protos import errors
from student_trainer.teacher_client.http_connection import retry_after

_TOO_LONG = re.compile(
    r"maximum context length|longer than the model's context length|exceeds the (model's )?(maximum|context)"
    r"|greater than (max allowed|max_model_len)|exceeds the maximum allowed",
    re.IGNORECASE,
)
_ENGINE_DOWN = re.compile(r"EngineCore|EngineDead|engine (is )?(dead|down)|AsyncEngineDead", re.IGNORECASE)
_NO_MODEL = re.compile(r"model", re.IGNORECASE)


def stock_error(status: int, headers: httpx.Headers, body: bytes) -> errors.TeacherError:
    """The error of an answer.

    401 and 403 are about the key, 404 that names a model is another teacher (TeacherMismatch) and else a missing
    route (Unsupported), 400 over a limit TooLarge and else InvalidRequest, 408 DeadlineExceeded, 429 Overloaded, 500
    TeacherFailed unless the engine behind it is down, 502 and 503 Unavailable.
    """
    text = error_text(body) or f"HTTP status {status}"
    delay = retry_after(headers)
    kind: type[errors.TeacherError] | None = None
    if status in (400, 413, 422) and _TOO_LONG.search(text):
        kind = errors.TooLarge
    elif status == 404 and _NO_MODEL.search(text):
        kind = errors.TeacherMismatch
    elif status == 408:
        kind = errors.DeadlineExceeded
    elif status == 500 and _ENGINE_DOWN.search(text):
        kind = errors.Unavailable
    if kind is not None:
        return kind(text, retry_after_s=delay)
    request_id = headers.get("x-request-id", "")
    return errors.from_wire("", text, http_status=status, retry_after_s=delay, request_id=request_id)


def error_text(body: bytes) -> str:
    """What a body says: OpenAI's `error.message`, or the other shapes that such servers have, cut at 500 characters."""
    try:
        answer: Any = json.loads(body)
    except ValueError:
        return body[:200].decode("utf-8", "replace").strip()
    for key in ("error", "detail", "message"):
        found = answer.get(key) if isinstance(answer, dict) else None
        if isinstance(found, dict):
            found = found.get("message")
        if found:
            return str(found)[:500]
    return str(answer)[:500]
