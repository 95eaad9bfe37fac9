"""`python -m teacher_server ping`: is a teacher there, does it answer calls, does it take this key, and who is it?

Over HTTP or gRPC, whatever the address names. It exits with 0 where calls with this key would be answered.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from protos.scores import TeacherInfo
from teacher_server.commands.remote import Place, Remote, RemoteError, explain, parser_of, run


def main(arguments: Sequence[str]) -> int:
    """Runs the command."""
    parser = parser_of("ping", "Says whether a teacher is reached, is ready, takes the key, and who it is.")
    parser.add_argument("--count", type=int, default=5, metavar="N", help="Times to measure [default: 5].")
    return run(parser, arguments, _ping)


def _ping(options: Any, place: Place) -> int:
    count = max(1, options.count)
    lines = (_grpc if place.is_grpc else _http)(place, count)
    print(place.address)
    for name, said, _ in lines:
        print(f"  {name:<9}{said}")
    return 0 if all(fine for _, _, fine in lines) else 1


def _http(place: Place, count: int) -> list[tuple[str, str, bool]]:
    with Remote(place) as remote:
        lines = [("reached", _timed(lambda: _healthy(remote), count), True)]
        ready = remote.ask("GET", "/ready")
        lines.append(("ready", "yes" if ready.is_success else explain(ready), ready.is_success))
        answer = remote.ask("GET", "/v1/teacher")
        if answer.is_success:
            lines.append(("key", "taken" if place.key else "none given, none wanted", True))
            lines.append(("teacher", _described(answer.json()), True))
        else:
            lines.append(("teacher" if answer.status_code == 503 else "key", explain(answer), False))
        return lines


def _healthy(remote: Remote) -> None:
    answer = remote.ask("GET", "/health")
    if answer.text != "ok\n":
        raise RemoteError(f"{remote.place.address} is no teacher: /health answers with status {answer.status_code}")


def _grpc(place: Place, count: int) -> list[tuple[str, str, bool]]:
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_status import rpc_status

    from protos import codec
    from protos.teacher.v1 import teacher_pb2, teacher_pb2_grpc

    metadata = [("authorization", f"Bearer {place.key}")] if place.key else []
    with _channel(place) as channel:
        health, teacher = health_pb2_grpc.HealthStub(channel), teacher_pb2_grpc.TeacherServiceStub(channel)

        def check() -> Any:
            return health.Check(health_pb2.HealthCheckRequest(), timeout=place.timeout_s).status

        try:
            lines = [("reached", _timed(check, count), True)]
            serving = check() == health_pb2.HealthCheckResponse.SERVING
        except grpc.RpcError as error:
            said = error.details()  # type: ignore[attr-defined]
            raise RemoteError(
                f"nobody answers gRPC at {place.address} ({said}); is that its gRPC port, and does it speak TLS there "
                "(grpcs://) as asked?"
            ) from error
        lines.append(("ready", "yes" if serving else "no, grpc.health.v1 says NOT_SERVING", serving))
        try:
            request = teacher_pb2.GetTeacherRequest()
            info = codec.decode_teacher(teacher.GetTeacher(request, timeout=place.timeout_s, metadata=metadata))
        except grpc.RpcError as error:
            status = rpc_status.from_call(error)  # type: ignore[arg-type]
            told = str(codec.decode_error(status)) if status else str(error.details())  # type: ignore[attr-defined]
            return [*lines, ("teacher", told, False)]
        lines.append(("key", "taken" if place.key else "none given, none wanted", True))
        return [*lines, ("teacher", _described(_plain(info)), True)]


def _channel(place: Place) -> Any:
    import grpc

    target = place.address.partition("://")[2] or place.address
    options = [("grpc.enable_http_proxy", 0)]
    if not place.tls:
        return grpc.insecure_channel(target, options=options)
    place.context()  # says what is wrong with a file, which grpc does not
    files = place.read(place.ca_file), place.read(place.client_key_file), place.read(place.client_cert_file)
    return grpc.secure_channel(target, grpc.ssl_channel_credentials(*files), options=options)


def _timed(call: Callable[[], Any], count: int) -> str:
    """How long a call takes; the first opens the connection and does not count."""
    call()
    taken = []
    for _ in range(count):
        began = time.perf_counter()
        call()
        taken.append(1000 * (time.perf_counter() - began))
    return f"yes, {statistics.median(taken):.1f} ms (median of {count}, {min(taken):.1f} to {max(taken):.1f})"


def _plain(info: TeacherInfo) -> dict[str, Any]:
    limits = {"sequence_tokens": info.limits.sequence_tokens}
    return {
        name: getattr(info, name) for name in ("name", "engine", "dtype", "quantization", "fingerprint", "vocab_size")
    } | {"limits": limits}


def _described(info: dict[str, Any]) -> str:
    kind = f"{info['dtype']}" if info["quantization"] == "none" else f"{info['dtype']} {info['quantization']}"
    return (
        f"{info['name']}, {info['engine']}, {kind}, {info['vocab_size']} tokens of vocabulary, up to "
        f"{info['limits']['sequence_tokens']} a sequence, fingerprint {info['fingerprint'][:12]}"
    )
