"""Computations in flight, which equal requests join. It knows no cache and no engine."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from protos.scores import Scores
from teacher_server.cache.keys import Key
from teacher_server.scheduling import Unit


class Flight:
    """One computation with the number of those who wait for it."""

    def __init__(self, task: asyncio.Task[Scores], unit: Unit) -> None:
        self.task = task
        self.waiters = 0
        self.unit = unit
        """Its place in the queue, which those who join it may claim too."""


class Flights:
    """Computations in flight by key; the last waiter that leaves cancels the computation, others never do."""

    def __init__(self) -> None:
        self._by_key: dict[Key, Flight] = {}

    def __len__(self) -> int:
        return len(self._by_key)

    def __contains__(self, key: Key) -> bool:
        """Whether an equal request can join; a flight that everybody has left is being cancelled."""
        flight = self._by_key.get(key)
        return flight is not None and flight.waiters > 0 and not flight.task.done()

    def start(self, key: Key, work: Coroutine[Any, Any, Scores], unit: Unit) -> Flight:
        """A new flight with its starter as the first waiter."""
        flight = Flight(asyncio.get_running_loop().create_task(work), unit)
        flight.waiters = 1
        self._by_key[key] = flight
        flight.task.add_done_callback(lambda _: self._landed(key, flight))
        return flight

    def join(self, key: Key) -> Flight:
        """The flight under `key`, with one waiter more."""
        flight = self._by_key[key]
        flight.waiters += 1
        return flight

    def leave(self, flight: Flight) -> None:
        """Takes a waiter away."""
        flight.waiters -= 1
        if flight.waiters == 0 and not flight.task.done():
            flight.task.cancel()

    def _landed(self, key: Key, flight: Flight) -> None:
        if self._by_key.get(key) is flight:
            del self._by_key[key]
        if not flight.task.cancelled():
            flight.task.exception()  # marks it as seen where every waiter has left
