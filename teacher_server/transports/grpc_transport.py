"""gRPC: the TeacherService of teacher.proto, grpc.health.v1 and reflection.

Turns messages into domain objects and back through the codec, finds out who is calling, and gives every error its
rich status. It knows no engine and decides nothing about a request.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from protos import codec
from protos.errors import TeacherError
from protos.scores import GenerateRequest, ScoreRequest
from protos.teacher.v1 import teacher_pb2_grpc
from teacher_server.auth import Authenticator, Caller
from teacher_server.config_sections import LimitsConfig
from teacher_server.exchange import current
from teacher_server.service import TeacherService
from teacher_server.transports.grpc_gate import Context, Gate, abort, address, headers_of
from teacher_server.transports.grpc_health import HealthServicer
from teacher_server.transports.reading import Reading
from teacher_server.transports.tls import Tls

SERVICE = "teacher.v1.TeacherService"
HEALTH = "grpc.health.v1.Health"
SERVICES = ("", SERVICE)
"""Names under which health is reported; the empty one is the whole server."""
PING_S, PONG_S = 60.0, 20.0
"""Seconds of silence after which a client is asked whether it is there, and for its answer; else its calls end."""


class TeacherServicer(teacher_pb2_grpc.TeacherServiceServicer):
    """The four methods."""

    def __init__(
        self, service: TeacherService, authenticator: Authenticator, max_request_bytes: int, reading: Reading
    ) -> None:
        self._service = service
        self._authenticator = authenticator
        self._max_request_bytes = max_request_bytes
        self._reading = reading

    def _caller(self, context: Context) -> Caller:
        client = self._authenticator.identify(headers_of(context.invocation_metadata()), address(context.peer()))
        return Caller.of(client, "grpc", context.time_remaining())

    async def GetTeacher(self, request: Any, context: Context) -> Any:
        """See TeacherService.GetTeacher."""
        try:
            self._caller(context)
            return codec.encode_teacher(self._service.teacher())
        except TeacherError as error:
            await abort(context, error)

    async def Score(self, request_iterator: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        """See TeacherService.Score."""
        try:
            caller = self._caller(context)
            with self._service.decoding("score", caller):
                call = await self._read_score(request_iterator)
            async with aclosing(self._service.score(call, caller)) as results:
                async for index, scores in results:
                    for response in caller.exchange.written(codec.encode_scores(index, scores)):
                        yield response
        except TeacherError as error:
            await abort(context, error)

    async def Generate(self, request: Any, context: Context) -> AsyncIterator[Any]:
        """See TeacherService.Generate."""
        try:
            caller = self._caller(context)
            with self._service.decoding("generate", caller):
                call = self._read_generate(request)
            async with aclosing(self._service.generate(call, caller)) as results:
                async for deltas in results:
                    with caller.exchange.writing():
                        message = codec.encode_deltas(deltas)
                    yield message
        except TeacherError as error:
            await abort(context, error)

    async def _read_score(self, messages: AsyncIterator[Any]) -> ScoreRequest:
        """The messages of a call as one, which must come in time."""
        reader, received = codec.ScoreRequestReader(self._max_request_bytes), 0
        began = asyncio.get_running_loop().time()
        with self._reading.hold() as add:
            try:
                async with asyncio.timeout_at(began + self._reading.seconds(0)) as limit:
                    async for message in messages:
                        received += message.ByteSize()
                        add(message.ByteSize())
                        with current().reading():
                            reader.add(message)
                        limit.reschedule(began + self._reading.seconds(received))
            except TimeoutError as error:
                raise self._reading.too_slow(received) from error
            with current().reading():
                return reader.finish()

    def _read_generate(self, message: Any) -> GenerateRequest:
        with self._reading.hold() as add:
            add(message.ByteSize())
            with current().reading():
                return codec.decode_generate_request(message)

    async def GetHead(self, request: Any, context: Context) -> AsyncIterator[Any]:
        """See TeacherService.GetHead."""
        try:
            caller = self._caller(context)
            async with aclosing(self._service.head(request.fingerprint, caller)) as parts:
                async for part in parts:
                    with caller.exchange.writing():
                        message = codec.encode_head(part)
                    yield message
        except TeacherError as error:
            await abort(context, error)


class GrpcTransport:
    """A gRPC server on one port; health is NOT_SERVING until `set_serving`."""

    def __init__(
        self,
        service: TeacherService,
        authenticator: Authenticator,
        limits: LimitsConfig,
        reading: Reading,
        *,
        tls: Tls | None = None,
        max_message_bytes: int,
        max_request_bytes: int,
    ) -> None:
        self._tls = tls
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.so_reuseport", 0),  # a second server on the port must fail instead of sharing it
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
                ("grpc.http2.max_ping_strikes", 2),  # then the connection is closed: too many pings
                ("grpc.keepalive_time_ms", int(1000 * PING_S)),
                ("grpc.keepalive_timeout_ms", int(1000 * PONG_S)),
                ("grpc.http2.ping_timeout_ms", int(1000 * PONG_S)),
                ("grpc.max_concurrent_streams", limits.streams),
                ("grpc.max_allowed_incoming_connections", limits.connections),
                ("grpc.max_metadata_size", limits.head_kib << 10),
                ("grpc.absolute_max_metadata_size", limits.head_kib << 10),
                ("grpc.server_handshake_timeout_ms", int(1000 * limits.head_s)),
            ],
            interceptors=[Gate(authenticator, service.metrics)],
        )
        servicer = TeacherServicer(service, authenticator, max_request_bytes, reading)
        teacher_pb2_grpc.add_TeacherServiceServicer_to_server(servicer, self._server)
        self._health = HealthServicer(SERVICES)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE, HEALTH, reflection.SERVICE_NAME), self._server)

    async def start(self, host: str, port: int) -> int:
        """Binds and serves; returns the port. OSError where the port is taken or the address is not this machine's."""
        literal = f"[{host}]" if ":" in host else host
        try:
            if self._tls is None:
                bound = self._server.add_insecure_port(f"{literal}:{port}")
            else:
                bound = self._server.add_secure_port(f"{literal}:{port}", self._tls.grpc_credentials())
        except RuntimeError as error:
            raise OSError(f"cannot listen for gRPC on {literal}:{port}: the port is in use or not permitted") from error
        await self._server.start()
        return int(bound)

    def set_serving(self, serving: bool) -> None:
        """Reports health to grpc.health.v1, and to those who watch it."""
        self._health.set(serving)

    async def stop(self, grace_s: float) -> None:
        """Refuses new calls, lets those in progress end for `grace_s` seconds, then cancels them."""
        self._health.close()
        await self._server.stop(grace_s)
