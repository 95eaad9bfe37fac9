"""What HTTP handlers share: bodies within a limit, calls that end when the client goes, and streams that begin late.

It knows no route and no message.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable, Iterator
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from protos.errors import TeacherError, TooLarge
from teacher_server.exchange import current

Item = TypeVar("Item")


async def read_body(request: Request, max_bytes: int, received: Callable[[int], None]) -> bytes:
    """The request's body; TooLarge as soon as it is announced to be, or turns out to be, over `max_bytes`.

    `received` is called with each part's size; what it raises ends the call.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > max_bytes:
        raise TooLarge(f"the body has {announced} bytes, this server accepts {max_bytes}; split the call")
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > max_bytes:
            raise TooLarge(f"the body has more than {max_bytes} bytes, the limit of this server; split the call")
        received(len(part))
        parts.append(part)
    return b"".join(parts)


async def while_connected(request: Request, work: Coroutine[Any, Any, Item]) -> Item:
    """What `work` gives; cancels it and raises ClientDisconnect when the client goes first. The body has been read."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.wait({task, gone})
        if not task.cancelled():
            task.exception()  # marks it as seen


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _Stream(StreamingResponse):
    """Closes the call's iterator however the response ends, so that a call never outlives its client."""

    def __init__(self, items: AsyncGenerator[Any, None], body: AsyncIterator[bytes], media_type: str) -> None:
        super().__init__(body, media_type=media_type)
        self._items = items

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._items.aclose()


async def stream(
    request: Request,
    items: AsyncGenerator[Item, None],
    encode: Callable[[Item], Iterable[bytes]],
    *,
    media_type: str,
    on_error: Callable[[TeacherError], bytes],
    last: Callable[[], Iterable[bytes]] = tuple,
) -> Response:
    """A response that begins with the first item, so that an error before it still has its own status.

    A later error is `on_error`'s bytes at the end of the stream; a stream that is complete ends with `last()`.
    """
    try:
        first = await while_connected(request, _first(items))
    except BaseException:
        await items.aclose()
        raise

    own = current()

    def encoded(item: Item) -> Iterator[bytes]:
        with own.writing():  # what is no generator is made now
            parts = encode(item)
        return own.written(parts)

    async def body() -> AsyncIterator[bytes]:
        try:
            for item in first:
                for data in encoded(item):
                    yield data
            async for item in items:
                for data in encoded(item):
                    yield data
            for data in last():
                yield data
        except TeacherError as error:
            yield on_error(error)

    return _Stream(items, body(), media_type)


async def _first(items: AsyncGenerator[Item, None]) -> list[Item]:
    """The first item, or nothing where there is none."""
    async for item in items:
        return [item]
    return []
