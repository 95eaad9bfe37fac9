"""A TCP proxy that breaks connections as told: it knows bytes and no protocol.

A fault strikes a connection once so many bytes of answers have gone through it, and so many connections in all; those
after them are whole, so that whoever tries again gets through in the end.
"""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from contextlib import suppress
from dataclasses import dataclass

CHUNK = 1 << 14
FAULTS = ("cut", "reset", "half-open", "delay", "duplicate")


@dataclass(frozen=True)
class Fault:
    """What happens: `kind` is one of FAULTS.

    cut ends both sides in order, reset with RST, half-open forwards nothing more and closes nothing, delay holds every
    piece back for up to `delay_s`, duplicate opens a second connection that sends the server all the same bytes.
    `least` and `most` bound the bytes of answers before cut, reset and half-open; `strikes` is how many connections
    are struck.
    """

    kind: str
    least: int = 200
    most: int = 6000
    strikes: int = 8
    delay_s: float = 0.03


class Proxy:
    """Forwards 127.0.0.1:`port` to the same port's `target` with one fault, until it is closed."""

    def __init__(self, target: str, fault: Fault | None = None, seed: int = 0) -> None:
        host, _, port = target.rpartition(":")
        self._target = host.rpartition("/")[2], int(port)
        self._fault, self._random = fault, random.Random(seed)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._left = fault.strikes if fault else 0
        self.struck = 0
        """Connections that were struck, or pieces that were held back."""
        self.address = target.removesuffix(f":{port}") + f":{self._listener.getsockname()[1]}"
        self._start(self._accept)

    def close(self) -> None:
        """Ends every connection."""
        self._closed.set()
        for one in (self._listener, *self._sockets):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        for thread in self._threads:
            thread.join(10)

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, work: object, *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
            except OSError:
                continue
            with self._lock:
                self._sockets += [client, server]
                strike = self._fault is not None and self._left > 0
                self._left -= strike
                at = self._random.randint(self._fault.least, self._fault.most) if self._fault else 0
            copies = [server]
            if strike and self._fault is not None and self._fault.kind == "duplicate":
                copies.append(socket.create_connection(self._target))
                self._sockets.append(copies[1])
                self._start(_drain, copies[1])
                self.struck += 1
            Connection(self, client, copies, self._fault if strike else None, at)


class Connection:
    """Two threads: one for what the client says, one for the answers."""

    def __init__(
        self, proxy: Proxy, client: socket.socket, servers: list[socket.socket], fault: Fault | None, at: int
    ) -> None:
        self._proxy, self._client, self._servers, self._fault, self._at = proxy, client, servers, fault, at
        self._frozen = False
        proxy._start(self._requests)
        proxy._start(self._answers)

    def _hold(self) -> None:
        if self._fault is not None and self._fault.kind == "delay":
            self._proxy.struck += 1
            time.sleep(self._proxy._random.uniform(0, self._fault.delay_s))

    def _requests(self) -> None:
        with suppress(OSError):
            while data := self._client.recv(CHUNK):
                self._hold()
                if self._frozen:
                    continue
                self._servers[0].sendall(data)
                for copy in self._servers[1:]:
                    with suppress(OSError):
                        copy.sendall(data)
        if not self._frozen:
            self._end(self._servers)

    def _answers(self) -> None:
        passed, breaks = 0, self._fault is not None and self._fault.kind in ("cut", "reset", "half-open")
        with suppress(OSError):
            while data := self._servers[0].recv(CHUNK):
                self._hold()
                if self._frozen:
                    continue
                if breaks and passed + len(data) >= self._at:
                    self._client.sendall(data[: self._at - passed])
                    self._break()
                    if not self._frozen:
                        return
                    continue
                self._client.sendall(data)
                passed += len(data)
        if not self._frozen:
            self._end([self._client])

    def _break(self) -> None:
        assert self._fault is not None
        self._proxy.struck += 1
        if self._fault.kind == "half-open":
            self._frozen = True
            return
        if self._fault.kind == "reset":
            for one in (self._client, *self._servers):
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                with suppress(OSError):
                    one.shutdown(socket.SHUT_RD)  # wakes up the thread that reads from it
                one.close()
            return
        self._end([self._client, *self._servers])

    @staticmethod
    def _end(some: list[socket.socket]) -> None:
        for one in some:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


def _drain(one: socket.socket) -> None:
    with suppress(OSError):
        while one.recv(CHUNK):
            pass
