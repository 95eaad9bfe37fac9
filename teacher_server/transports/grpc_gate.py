"""What stands before every gRPC method: keys, and bytes that are no message.

A call that is refused is refused before any of its messages is read. It knows no service's methods, only their names'
`access` decisions.
"""

from __future__ import annotations

import functools
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError
from grpc_status import rpc_status

from protos import codec
from protos.errors import InvalidRequest, TeacherError
from teacher_server import exchange
from teacher_server.auth import Authenticator
from teacher_server.exchange import REQUEST_ID_HEADER, Exchange
from teacher_server.metrics import Metrics
from teacher_server.transports import access

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


async def abort(context: Context, error: TeacherError) -> None:
    """Ends the call with the error's status, its details, and the call's id in both."""
    request_id = exchange.current().request_id
    status = rpc_status.to_status(codec.encode_error(error, request_id))
    trailing = (*status.trailing_metadata, (REQUEST_ID_HEADER, request_id))
    await context.abort(status.code, status.details, trailing)


def _begin(context: Context) -> Exchange:
    """A call's exchange, whose id is in the trailing metadata however the call ends."""
    own = exchange.begin(headers_of(context.invocation_metadata()))
    context.set_trailing_metadata(((REQUEST_ID_HEADER, own.request_id),))
    return own


def headers_of(metadata: Any) -> Mapping[str, str]:
    """Metadata with lower-case keys; binary values, which no header of ours has, as text."""
    return {str(key).lower(): value if isinstance(value, str) else repr(value) for key, value in metadata or ()}


def address(peer: str) -> str:
    """The address of grpc's `ipv4:127.0.0.1:50000`, `ipv6:%5B::1%5D:50000` or `unix:path`, without a port."""
    match = re.fullmatch(r"ipv[46]:(?:%5B|\[)?(.*?)(?:%5D|\])?:\d+", peer)
    return match[1] if match else peer


class Gate(grpc.aio.ServerInterceptor):
    """Lets in who may come in; see `access`."""

    def __init__(self, authenticator: Authenticator, metrics: Metrics) -> None:
        self._authenticator, self._metrics = authenticator, metrics

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        """grpc's: the handler of a call."""
        decision = access.of_method(details.method)
        if not decision.open:
            try:
                client = self._authenticator.identify(headers_of(details.invocation_metadata), "")
                client.require(decision.needs)
            except TeacherError as error:
                self._metrics.refused.labels("grpc", error.reason).inc()
                return _refusing(error)
        handler = await continuation(details)
        return None if handler is None else _checked(handler, self._metrics)


def _refusing(error: TeacherError) -> Any:
    """A handler that reads nothing, whatever kind of method was called."""

    async def refuse(_requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        _begin(context)
        await abort(context, error)
        yield b""

    return grpc.stream_stream_rpc_method_handler(refuse)


def _checked(handler: Any, metrics: Metrics) -> Any:
    """The handler in an exchange, with InvalidRequest instead of UNKNOWN for bytes that are no message of its type."""
    parse, serialize = handler.request_deserializer, handler.response_serializer
    make = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[handler.request_streaming, handler.response_streaming]
    inner = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    if parse is None:
        return handler
    wrap = _stream if handler.response_streaming else _unary
    convert = _messages if handler.request_streaming else _message
    behaviour = functools.partial(wrap, inner, functools.partial(convert, parse), metrics)
    return make(behaviour, None, functools.partial(_serialized, serialize))


def _serialized(serialize: Callable[[Any], bytes], message: Any) -> bytes:
    with exchange.current().writing():
        return serialize(message)


def _message(parse: Callable[[bytes], Any], data: bytes) -> Any:
    try:
        with exchange.current().reading():
            return parse(data)
    except DecodeError as error:
        raise InvalidRequest(f"what came with {len(data)} bytes is not a message of this method") from error


async def _messages(parse: Callable[[bytes], Any], requests: AsyncIterator[bytes]) -> AsyncIterator[Any]:
    async for data in requests:
        yield _message(parse, data)


async def _unary(inner: Any, convert: Any, metrics: Metrics, request: Any, context: Context) -> Any:
    own = _begin(context)
    try:
        return await inner(convert(request), context)
    except TeacherError as error:
        await abort(context, error)
    finally:
        metrics.count_bytes(own)


async def _stream(inner: Any, convert: Any, metrics: Metrics, request: Any, context: Context) -> AsyncIterator[Any]:
    own = _begin(context)
    try:
        async with aclosing(inner(convert(request), context)) as answers:
            async for answer in answers:
                yield answer
    except TeacherError as error:
        await abort(context, error)
    finally:
        metrics.count_bytes(own)
