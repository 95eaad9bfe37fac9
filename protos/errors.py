"""The error tree of the service and the one table that gives each error its status on either transport.

    TeacherError
    ├── InvalidRequest          INVALID_ARGUMENT     422   the request can never succeed as it is
    │   ├── InvalidSequence                                one sequence or prompt is wrong; `index` names it
    │   └── InvalidSpec                                    top_k, temperatures, sampling, ... are wrong
    ├── TooLarge                RESOURCE_EXHAUSTED   413   over a limit of this teacher
    ├── TeacherMismatch         FAILED_PRECONDITION  412   another fingerprint, vocabulary or tokenizer
    ├── Unauthenticated         UNAUTHENTICATED      401
    ├── PermissionDenied        PERMISSION_DENIED    403
    ├── Overloaded              RESOURCE_EXHAUSTED   429   with a delay after which to retry
    ├── Unavailable             UNAVAILABLE          503   loading, draining or down; with a delay
    ├── DeadlineExceeded        DEADLINE_EXCEEDED    504
    ├── Unsupported             UNIMPLEMENTED        501   this teacher cannot honour it
    └── TeacherFailed           INTERNAL             500   fixed text; the cause is in the server's log

Nothing else maps errors. This module knows names of statuses, not a transport.
"""

from __future__ import annotations

from typing import ClassVar

DOMAIN = "strong2weak"
"""The `domain` of every ErrorInfo, and the prefix of every problem type."""


class TeacherError(Exception):
    """Base of all errors that the teacher service reports.

    `message` says what was wrong, with the numbers, and what to do. `retry_after_s` is the delay in seconds after which
    the same call may succeed, where there is one. `index` is the sequence or prompt at fault, where there is one.
    `request_id` names the call in the server's log, for whoever received the error from a server.
    """

    grpc_code: ClassVar[str] = "INTERNAL"
    http_status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False
    request_id: str = ""

    def __init__(self, message: str, *, retry_after_s: float | None = None, index: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s
        self.index = index

    def __str__(self) -> str:
        return f"{self.message} (request {self.request_id})" if self.request_id else self.message

    def reworded(self, message: str, *, index: int | None) -> TeacherError:
        """The same error in other words, of another sequence or prompt."""
        other = type(self)(message, retry_after_s=self.retry_after_s, index=index)
        other.request_id = self.request_id
        return other

    @property
    def reason(self) -> str:
        """The class name in upper snake case, as ErrorInfo carries it: `TooLarge` -> `TOO_LARGE`."""
        return reason_of(type(self))


class InvalidRequest(TeacherError):
    """The request can never succeed as it is."""

    grpc_code, http_status = "INVALID_ARGUMENT", 422


class InvalidSequence(InvalidRequest):
    """One sequence or prompt of the call is wrong; `index` names it and nothing of the call was computed."""


class InvalidSpec(InvalidRequest):
    """A specification (top_k, temperatures, wanted fields, sampling) is wrong."""


class TooLarge(TeacherError):
    """The request is over a limit of this teacher; a smaller one is accepted."""

    grpc_code, http_status = "RESOURCE_EXHAUSTED", 413


class TeacherMismatch(TeacherError):
    """The teacher is not the one that the client expects: fingerprint, vocabulary or tokenizer differ."""

    grpc_code, http_status = "FAILED_PRECONDITION", 412


class Unauthenticated(TeacherError):
    """No key, or one that this teacher does not know."""

    grpc_code, http_status = "UNAUTHENTICATED", 401


class PermissionDenied(TeacherError):
    """A known key that may not do this."""

    grpc_code, http_status = "PERMISSION_DENIED", 403


class Overloaded(TeacherError):
    """The queue is full; retry after the delay."""

    grpc_code, http_status, retryable = "RESOURCE_EXHAUSTED", 429, True


class Unavailable(TeacherError):
    """The teacher is loading, draining, down or out of reach; retry after the delay."""

    grpc_code, http_status, retryable = "UNAVAILABLE", 503, True


class DeadlineExceeded(TeacherError):
    """The caller's deadline passed before the answer was complete."""

    grpc_code, http_status = "DEADLINE_EXCEEDED", 504


class Unsupported(TeacherError):
    """This teacher cannot honour a field or method; GetTeacher says what it can."""

    grpc_code, http_status = "UNIMPLEMENTED", 501


class TeacherFailed(TeacherError):
    """The engine failed or gave a non-finite result; the text is fixed so that nothing internal leaks."""

    grpc_code, http_status = "INTERNAL", 500

    TEXT: ClassVar[str] = "the teacher failed on this request; the cause is in the server's log"

    def __init__(self, message: str = TEXT, *, retry_after_s: float | None = None, index: int | None = None) -> None:
        super().__init__(message, retry_after_s=retry_after_s, index=index)


TABLE: tuple[type[TeacherError], ...] = (
    InvalidRequest,
    InvalidSequence,
    InvalidSpec,
    TooLarge,
    TeacherMismatch,
    Unauthenticated,
    PermissionDenied,
    Overloaded,
    Unavailable,
    DeadlineExceeded,
    Unsupported,
    TeacherFailed,
)
"""Every class that can cross the wire; its attributes are its row of the table."""


def reason_of(kind: type[TeacherError]) -> str:
    """Upper snake case of a class name: `InvalidRequest` -> `INVALID_REQUEST`."""
    return "".join("_" + c if c.isupper() and i else c for i, c in enumerate(kind.__name__)).upper()


_BY_REASON = {reason_of(kind): kind for kind in TABLE}
_BY_GRPC_CODE: dict[str, type[TeacherError]] = {
    "INVALID_ARGUMENT": InvalidRequest,
    "OUT_OF_RANGE": InvalidRequest,
    "FAILED_PRECONDITION": TeacherMismatch,
    "UNAUTHENTICATED": Unauthenticated,
    "PERMISSION_DENIED": PermissionDenied,
    "UNAVAILABLE": Unavailable,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "UNIMPLEMENTED": Unsupported,
}
_BY_HTTP_STATUS: dict[int, type[TeacherError]] = {
    400: InvalidRequest,
    422: InvalidRequest,
    413: TooLarge,
    412: TeacherMismatch,
    401: Unauthenticated,
    403: PermissionDenied,
    429: Overloaded,
    502: Unavailable,
    503: Unavailable,
    504: DeadlineExceeded,
    501: Unsupported,
    404: Unsupported,
    405: Unsupported,
}


def from_wire(
    reason: str,
    message: str,
    *,
    grpc_code: str = "",
    http_status: int = 0,
    retry_after_s: float | None = None,
    index: int | None = None,
    request_id: str = "",
) -> TeacherError:
    """The error that a client raises for what it received.

    `reason` decides where it is known; a status from a proxy or another server, which carries none, is mapped by
    its code alone: RESOURCE_EXHAUSTED is Overloaded with a delay and TooLarge without one.
    """
    kind = _BY_REASON.get(reason)
    if kind is None and grpc_code == "RESOURCE_EXHAUSTED":
        kind = TooLarge if retry_after_s is None else Overloaded
    if kind is None:
        kind = _BY_GRPC_CODE.get(grpc_code) or _BY_HTTP_STATUS.get(http_status) or TeacherFailed
    error = kind(message, retry_after_s=retry_after_s, index=index)
    error.request_id = request_id
    return error
