"""The error table: every class over both encodings, and foreign statuses."""

import ast
from pathlib import Path

import pytest
from google.rpc import status_pb2

from protos import codec, errors

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("kind", errors.TABLE, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(("delay", "index"), [(None, None), (2.5, None), (None, 3), (0.001, 0)])
def test_every_error_survives_as_a_grpc_status(
    kind: type[errors.TeacherError], delay: float | None, index: int | None
) -> None:
    error = kind("the text", retry_after_s=delay, index=index)
    status = codec.encode_error(error)
    assert status.code == codec.GRPC_NUMBERS[kind.grpc_code]
    back = codec.decode_error(status_pb2.Status.FromString(status.SerializeToString()))
    assert type(back) is kind
    assert (back.message, back.retry_after_s, back.index) == ("the text", delay, index)


@pytest.mark.parametrize("kind", errors.TABLE, ids=lambda kind: kind.__name__)
def test_every_error_survives_as_an_http_frame(kind: type[errors.TeacherError]) -> None:
    with pytest.raises(kind) as caught:
        list(codec.unframe([codec.frame_error(kind("the text", retry_after_s=1.0, index=2))]))
    assert type(caught.value) is kind
    assert (caught.value.message, caught.value.retry_after_s, caught.value.index) == ("the text", 1.0, 2)


@pytest.mark.parametrize("kind", errors.TABLE, ids=lambda kind: kind.__name__)
def test_every_error_survives_as_the_reason_of_a_problem_document(kind: type[errors.TeacherError]) -> None:
    error = errors.from_wire(errors.reason_of(kind), "the text", http_status=kind.http_status, index=1)
    assert type(error) is kind
    assert error.index == 1


def test_the_table_is_the_design() -> None:
    rows = {k.__name__: (k.grpc_code, k.http_status, k.retryable) for k in errors.TABLE}
    assert rows == {
        "InvalidRequest": ("INVALID_ARGUMENT", 422, False),
        "InvalidSequence": ("INVALID_ARGUMENT", 422, False),
        "InvalidSpec": ("INVALID_ARGUMENT", 422, False),
        "TooLarge": ("RESOURCE_EXHAUSTED", 413, False),
        "TeacherMismatch": ("FAILED_PRECONDITION", 412, False),
        "Unauthenticated": ("UNAUTHENTICATED", 401, False),
        "PermissionDenied": ("PERMISSION_DENIED", 403, False),
        "Overloaded": ("RESOURCE_EXHAUSTED", 429, True),
        "Unavailable": ("UNAVAILABLE", 503, True),
        "DeadlineExceeded": ("DEADLINE_EXCEEDED", 504, False),
        "Unsupported": ("UNIMPLEMENTED", 501, False),
        "TeacherFailed": ("INTERNAL", 500, False),
    }


def test_the_table_holds_every_class_of_the_tree() -> None:
    def below(kind: type[errors.TeacherError]) -> set[type[errors.TeacherError]]:
        return {kind}.union(*(below(k) for k in kind.__subclasses__() if k.__module__ == errors.__name__))

    assert below(errors.TeacherError) - {errors.TeacherError} == set(errors.TABLE)


@pytest.mark.parametrize(
    ("code", "http", "delay", "kind"),
    [
        ("RESOURCE_EXHAUSTED", 0, None, errors.TooLarge),
        ("RESOURCE_EXHAUSTED", 0, 1.0, errors.Overloaded),
        ("UNAVAILABLE", 0, None, errors.Unavailable),
        ("UNKNOWN", 0, None, errors.TeacherFailed),
        ("", 502, None, errors.Unavailable),
        ("", 404, None, errors.Unsupported),
        ("", 418, None, errors.TeacherFailed),
    ],
)
def test_a_status_without_a_reason_is_mapped_by_its_code(
    code: str, http: int, delay: float | None, kind: type[errors.TeacherError]
) -> None:
    assert type(errors.from_wire("", "text", grpc_code=code, http_status=http, retry_after_s=delay)) is kind


def test_a_failure_of_the_engine_has_a_fixed_text() -> None:
    assert errors.TeacherFailed().message == errors.TeacherFailed.TEXT


def test_no_other_module_maps_errors_to_statuses() -> None:
    names = {kind.grpc_code for kind in errors.TABLE}
    for folder in ("teacher_server", "student_trainer"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Dict):
                    keys = {k.value for k in node.keys if isinstance(k, ast.Constant) and isinstance(k.value, str)}
                    assert len(keys & names) < 3, f"{path} holds a table of statuses"
