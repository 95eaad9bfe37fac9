"""A bounded quantity that clients share: how much each may hold, and how soon there is room again.

A client may hold as much as is free, times its weight: one alone half of all, each of n as many n + 1st parts, and as
much is left for the next that comes (Choudhury and Hahne, "Dynamic queue length thresholds", 1998, with alpha the
weight). A client that holds nothing gets its first call in whenever that fits at all. It knows neither calls nor an
engine.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping

WINDOW_S = 30.0
"""Seconds of work over which the rate is measured."""
SHORTEST_S = 0.1
"""Seconds of work under which a rate says nothing."""
MIN_DELAY_S, MAX_DELAY_S = 0.2, 60.0


class DrainRate:
    """What was finished for each second in which there was something to do; seconds of idleness do not count."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._worked = 0.0
        self._since: float | None = None
        self._finished: deque[tuple[float, int]] = deque()
        self._sum = 0

    @property
    def worked_s(self) -> float:
        """Seconds of work so far."""
        return self._worked + (0.0 if self._since is None else self._clock() - self._since)

    def busy(self, now_busy: bool) -> None:
        """Says whether there is something to do from now on."""
        if now_busy and self._since is None:
            self._since = self._clock()
        elif not now_busy and self._since is not None:
            self._worked, self._since = self.worked_s, None

    def finished(self, amount: int) -> None:
        """Counts something finished."""
        self._finished.append((self.worked_s, amount))
        self._sum += amount
        self._forget()

    def seconds(self, amount: float) -> float:
        """Estimated seconds until `amount` more is finished.

        Where nothing is known to finish, as long as there has been work already: it takes longer than that.
        """
        self._forget()
        span = min(WINDOW_S, self.worked_s)
        if self._sum == 0 or span < SHORTEST_S:
            return max(1.0, span)
        return amount * span / self._sum

    def _forget(self) -> None:
        while self._finished and self._finished[0][0] < self.worked_s - WINDOW_S:
            self._sum -= self._finished.popleft()[1]


class Pool:
    """At most `limit` held by all clients together; see the module for each one's part."""

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = limit
        self.held = 0
        """What all hold."""
        self._by_client: dict[str, int] = {}
        self._rate = DrainRate(clock)

    @property
    def by_client(self) -> Mapping[str, int]:
        """What each client holds; those that hold nothing are not there."""
        return self._by_client

    def excess(self, client: str, weight: float, amount: int) -> float:
        """How much must be given back before `amount` fits; 0 where it fits now.

        What is larger than all of it fits where nothing else is held.
        """
        own, free = self._by_client.get(client, 0), self.limit - self.held
        if self.held == 0:
            return 0.0
        excess = float(amount - free)
        if own:  # as all is given back, so is its own part
            excess = max(excess, (own + amount - weight * free) / (weight + own / self.held))
        return min(max(0.0, excess), float(self.held))

    def delay(self, excess: float) -> float:
        """Seconds after which that much will have been given back, at the measured rate, within sensible bounds."""
        return min(MAX_DELAY_S, max(MIN_DELAY_S, self._rate.seconds(excess) if excess else 0.0))

    def take(self, client: str, amount: int) -> None:
        """Counts `amount` as held."""
        self.held += amount
        self._by_client[client] = self._by_client.get(client, 0) + amount
        self._rate.busy(self.held > 0)

    def give(self, client: str, amount: int, *, finished: bool) -> None:
        """Gives back; `finished` where it was used and not only dropped, so that it counts for the rate."""
        if finished:
            self._rate.finished(amount)
        self.held -= amount
        left = self._by_client[client] - amount
        if left:
            self._by_client[client] = left
        else:
            del self._by_client[client]
        self._rate.busy(self.held > 0)
