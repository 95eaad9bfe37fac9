"""grpc.health.v1: what each service's health is, for whoever asks or watches; open to everybody.

grpcio-health-checking's own servicer writes to its watchers under a lock that a change of health needs too, so that one
watcher who does not read stops all changes. Here each watcher waits for itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_STATUS = health_pb2.HealthCheckResponse


class HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """The health of some services, NOT_SERVING at first."""

    def __init__(self, services: Iterable[str]) -> None:
        self._serving = dict.fromkeys(services, False)
        self._changed = asyncio.Event()
        self._closed = False

    def set(self, serving: bool) -> None:
        """Gives every service one health; watchers hear of it."""
        self._serving = dict.fromkeys(self._serving, serving)
        self._changed.set()
        self._changed = asyncio.Event()

    def close(self) -> None:
        """Ends every watch, so that watchers do not keep the server."""
        self._closed = True
        self.set(False)

    def _status(self, service: str) -> Any:
        serving = self._serving.get(service)
        if serving is None:
            return _STATUS.SERVICE_UNKNOWN
        return _STATUS.SERVING if serving else _STATUS.NOT_SERVING

    async def Check(self, request: Any, context: Any) -> Any:
        """The present health; NOT_FOUND for a service that is not here."""
        status = self._status(request.service)
        if status == _STATUS.SERVICE_UNKNOWN:
            await context.abort(grpc.StatusCode.NOT_FOUND, "this server has no such service")
        return _STATUS(status=status)

    async def List(self, request: Any, context: Any) -> Any:
        """The present health of every service; newer versions of grpcio-health-checking have this method."""
        statuses = {name: _STATUS(status=self._status(name)) for name in self._serving}
        return health_pb2.HealthListResponse(statuses=statuses)

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """The present health, then each other one."""
        last = None
        while True:
            changed, status = self._changed, self._status(request.service)
            if status != last:
                last = status
                yield _STATUS(status=status)
            elif self._closed:
                return
            else:
                await changed.wait()
