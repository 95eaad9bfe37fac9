"""A TCP proxy that delivers every byte a set time late, in both directions, as a long network path does.

Bytes are read as they come and queued, so the delay takes no bandwidth. It runs on a loop in a thread of its own.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

CHUNK = 1 << 16


@contextmanager
def delaying(target: str, delay_s: float) -> Iterator[str]:
    """host:port of a proxy before `target` (host:port); a round trip through it takes `delay_s` seconds longer."""
    loop, ready, port = asyncio.new_event_loop(), threading.Event(), list[int]()
    stop = asyncio.Event()

    async def main() -> None:
        host, _, number = target.rpartition(":")
        tasks: set[asyncio.Task[None]] = set()

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.create_task(connect(reader, writer))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            far_reader, far_writer = await asyncio.open_connection(host, int(number))
            try:
                await asyncio.gather(_carry(reader, far_writer, delay_s / 2), _carry(far_reader, writer, delay_s / 2))
            finally:
                writer.close()
                far_writer.close()

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        port.append(server.sockets[0].getsockname()[1])
        ready.set()
        await stop.wait()
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    thread = threading.Thread(target=loop.run_until_complete, args=(main(),), name="proxy", daemon=True)
    thread.start()
    ready.wait()
    try:
        yield f"127.0.0.1:{port[0]}"
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


async def _carry(source: asyncio.StreamReader, sink: asyncio.StreamWriter, delay_s: float) -> None:
    """Bytes from `source` to `sink`, each `delay_s` after it came, until either ends."""
    clock = asyncio.get_running_loop().time
    under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

    async def deliver() -> None:
        while True:
            due, data = await under_way.get()
            await asyncio.sleep(due - clock())
            with suppress(OSError):
                if not data:
                    sink.write_eof()
                    return
                sink.write(data)
                await sink.drain()

    delivery = asyncio.create_task(deliver())
    try:
        with suppress(OSError):
            while data := await source.read(CHUNK):
                under_way.put_nowait((clock() + delay_s, data))
        under_way.put_nowait((clock() + delay_s, b""))
        await delivery
    finally:
        delivery.cancel()
