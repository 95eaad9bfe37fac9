"""gRPC to one teacher server: one attempt of each call, statuses as the error tree.

It knows neither retries nor limits. Messages are bytes here; the codec makes and reads them. No message size option is
set: both ways stay below gRPC's default of 4 MiB.
"""

from __future__ import annotations

from collections.abc import Generator
from urllib.parse import urlsplit

import grpc
from google.rpc import status_pb2

from protos import codec, errors
from protos.head import Head
from protos.scores import CompletionDelta, GenerateRequest, ScoreRequest, Scores, TeacherInfo
from student_trainer.teacher_client import tracing
from student_trainer.teacher_client.credentials import Credentials, Key
from student_trainer.teacher_client.transport import CLIENT_HEADER, is_loopback

SERVICE = "/teacher.v1.TeacherService/"
STATUS_KEY = "grpc-status-details-bin"
KEEPALIVE_S, KEEPALIVE_TIMEOUT_S = 60.0, 20.0
"""Seconds of silence during a call after which the server is pinged, and that it has to answer the ping."""


class GrpcTransport:
    """See `transport.Transport`."""

    def __init__(
        self,
        address: str,
        target: str,
        name: str = "",
        credentials: Credentials | None = None,
        *,
        tls: bool = False,
        host: str = "",
    ) -> None:
        credentials = credentials or Credentials()
        self._address = address
        self._closed = False
        self._name: tuple[tuple[str, str], ...] = ((CLIENT_HEADER, name),) if name else ()
        self._key = Key(credentials)
        local = is_loopback(urlsplit(f"//{target}").hostname or "")
        options = [
            ("grpc.keepalive_time_ms", int(1000 * KEEPALIVE_S)),
            ("grpc.keepalive_timeout_ms", int(1000 * KEEPALIVE_TIMEOUT_S)),
            ("grpc.http2.ping_timeout_ms", int(1000 * KEEPALIVE_TIMEOUT_S)),  # else 60 s, whatever the line above says
            ("grpc.initial_reconnect_backoff_ms", 200),
            ("grpc.max_reconnect_backoff_ms", 5_000),
            ("grpc.use_local_subchannel_pool", 1),
            *([("grpc.enable_http_proxy", 0)] if local else []),
            *([("grpc.default_authority", f"{host}:{target.rpartition(':')[2]}")] if host else []),
            *([("grpc.ssl_target_name_override", host)] if host and tls else []),
        ]
        self._channel = (
            grpc.secure_channel(target, _tls(credentials), options=options)
            if tls
            else grpc.insecure_channel(target, options=options)
        )
        self._get_teacher: grpc.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(
            SERVICE + "GetTeacher"
        )
        self._score: grpc.StreamStreamMultiCallable[bytes, bytes] = self._channel.stream_stream(SERVICE + "Score")
        self._head: grpc.UnaryStreamMultiCallable[bytes, bytes] = self._channel.unary_stream(SERVICE + "GetHead")
        self._generate: grpc.UnaryStreamMultiCallable[bytes, bytes] = self._channel.unary_stream(SERVICE + "Generate")

    @property
    def address(self) -> str:
        """See `Transport.address`."""
        return self._address

    def teacher(self, timeout_s: float) -> TeacherInfo:
        """See `Transport.teacher`."""
        try:
            return codec.decode_teacher_bytes(self._get_teacher(b"", timeout=timeout_s, metadata=self._metadata()))
        except (grpc.RpcError, ValueError) as error:
            raise self._error(error, timeout_s) from error

    def score(self, request: ScoreRequest, timeout_s: float) -> list[Scores]:
        """See `Transport.score`."""
        messages = (m.SerializeToString() for m in codec.encode_score_request(request, codec.CHUNK_BYTES))
        reader = codec.ScoreResponseReader(len(request.sequences))
        results: dict[int, Scores] = {}
        try:
            for data in self._score(messages, timeout=timeout_s, metadata=self._metadata()):
                done = reader.add_bytes(data)
                if done is not None:
                    results[done[0]] = done[1]
        except (grpc.RpcError, ValueError) as error:
            raise self._error(error, timeout_s) from error
        if reader.missing:
            raise errors.TeacherFailed(f"the stream is broken: it ended with {reader.missing} sequences missing")
        return [results[index] for index in range(len(results))]

    def generate(self, request: GenerateRequest, timeout_s: float) -> Generator[list[CompletionDelta], None, None]:
        """See `Transport.generate`."""
        call = None
        try:
            data = codec.encode_generate_request(request).SerializeToString()
            call = self._generate(data, timeout=timeout_s, metadata=self._metadata())
            for message in call:
                yield codec.decode_deltas_bytes(message)
        except (grpc.RpcError, ValueError) as error:
            raise self._error(error, timeout_s) from error
        finally:
            if call is not None:
                call.cancel()

    def head(self, fingerprint: str, timeout_s: float) -> Generator[Head, None, None]:
        """See `Transport.head`."""
        call = None
        try:
            data = codec.encode_head_request(fingerprint).SerializeToString()
            call = self._head(data, timeout=timeout_s, metadata=self._metadata())
            for message in call:
                yield codec.decode_head_bytes(message)
        except (grpc.RpcError, ValueError) as error:
            raise self._error(error, timeout_s) from error
        finally:
            if call is not None:
                call.cancel()

    def close(self) -> None:
        """See `Transport.close`."""
        self._closed = True
        self._channel.close()

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return (*self._name, *self._key.headers(), *tracing.headers())

    def _error(self, error: Exception, timeout_s: float) -> errors.TeacherError:
        """The tree's error for what grpc raised; a ValueError is a call on a closed channel, or a broken answer."""
        if self._closed:
            return errors.Unavailable(f"the connection to {self._address} was closed")
        if not isinstance(error, grpc.RpcError):
            return errors.TeacherFailed(f"the stream is broken: {error}")
        assert isinstance(error, grpc.Call)
        code, text = error.code(), error.details() or ""
        trailing = dict(error.trailing_metadata() or ())
        if code is grpc.StatusCode.CANCELLED:
            return errors.Unavailable(f"the call to {self._address} was cancelled")
        status = status_pb2.Status(message=text)
        if STATUS_KEY in trailing:
            status.ParseFromString(trailing[STATUS_KEY])
        elif code is grpc.StatusCode.UNAVAILABLE:
            status.message = f"no teacher answers at {self._address}: {text}"
        elif code is grpc.StatusCode.DEADLINE_EXCEEDED:
            status.message = f"no answer from {self._address} within {timeout_s:.4g} s"
        return codec.decode_error(status, code.name)


def _tls(credentials: Credentials) -> grpc.ChannelCredentials:
    """How gRPC checks the teacher and presents this client; ValueError for files that cannot be used."""
    if credentials.of_tls:
        credentials.context()  # says what is wrong with a file, which grpc does not
    return grpc.ssl_channel_credentials(
        credentials.read("ca_file"), credentials.read("client_key_file"), credentials.read("client_cert_file")
    )
