"""One Score call as a client of this event loop makes it, over gRPC or HTTP, and how it ended.

Raw transports and no retry, so that a refusal is seen as it comes. Answers are decoded and checked to be whole. Knows
no load.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from typing import Any, Protocol
from urllib.parse import urlsplit

import grpc
from google.rpc import status_pb2

from protos import codec

OK, OVERLOADED = "OK", "OVERLOADED"
PROTOBUF = "application/x-protobuf"


class Caller(Protocol):
    """A client by its name."""

    async def score(self, message: bytes, sequences: int) -> str:
        """OK, or the reason of the refusal; `message` is a serialised ScoreRequest of that many sequences."""
        ...

    async def close(self) -> None:
        """Ends its connections."""
        ...


def _whole(messages: Iterable[bytes], sequences: int) -> str:
    reader = codec.ScoreResponseReader(sequences)
    for data in messages:
        reader.add_bytes(data)
    return OK if not reader.missing else "INCOMPLETE"


class GrpcCaller:
    """One gRPC connection."""

    def __init__(self, address: str, name: str) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        self._score: Any = self._channel.unary_stream("/teacher.v1.TeacherService/Score")
        self._metadata = (("x-client", name),)

    async def score(self, message: bytes, sequences: int) -> str:
        """See Caller."""
        try:
            return _whole([data async for data in self._score(message, metadata=self._metadata)], sequences)
        except grpc.aio.AioRpcError as error:
            details = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin", b"")
            return codec.decode_error(status_pb2.Status.FromString(details), error.code().name).reason

    async def close(self) -> None:
        """See Caller."""
        await self._channel.close()


class HttpCaller:
    """As many HTTP connections as it has calls at the same time; they stay open."""

    def __init__(self, address: str, name: str) -> None:
        place = urlsplit(address)
        self._host, self._port = place.hostname, place.port
        self._head = (
            f"POST /v1/score HTTP/1.1\r\nhost: {place.netloc}\r\nx-client: {name}\r\ncontent-type: {PROTOBUF}\r\n"
        )
        self._free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def score(self, message: bytes, sequences: int) -> str:
        """See Caller."""
        while self._free:
            try:
                return await self._ask(self._free.pop(), message, sequences)
            except (asyncio.IncompleteReadError, ConnectionError):  # it was idle for too long, and the server closed it
                continue
        return await self._ask(await asyncio.open_connection(self._host, self._port), message, sequences)

    async def _ask(
        self, pair: tuple[asyncio.StreamReader, asyncio.StreamWriter], message: bytes, sequences: int
    ) -> str:
        reader, writer = pair
        writer.write(f"{self._head}content-length: {len(message)}\r\n\r\n".encode() + message)
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        body = await _body(reader, head)
        if "\r\nconnection: close" in head:
            writer.close()
        else:
            self._free.append(pair)
        if head.split(" ", 2)[1] == "200":
            return _whole(codec.unframe(iter([body])), sequences)
        return str(json.loads(body)["reason"])

    async def close(self) -> None:
        """See Caller."""
        for _, writer in self._free:
            writer.close()
            await writer.wait_closed()


async def _body(reader: asyncio.StreamReader, head: str) -> bytes:
    if "transfer-encoding: chunked" not in head:
        return await reader.readexactly(int(head.partition("content-length:")[2].split("\r\n", 1)[0]))
    parts = []
    while size := int(await reader.readline(), 16):
        parts.append(await reader.readexactly(size))
        await reader.readexactly(2)
    await reader.readexactly(2)
    return b"".join(parts)
